"""A full disk: StoreFull, no leftovers, and uploads succeed once there is space."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from adaplex.adapters.checkpoint import CONFIG, WEIGHTS
from adaplex.adapters.errors import StoreFull
from adaplex.adapters.registry.registry import AdapterRegistry
from adapters.handmade import (
    UPLOAD,
    files,
    make_importer,
    objects,
    push,
    records,
    specs,
    stage,
    staged,
    tensors,
    write,
)

ALWAYS = range(1_000_000)
SYNCS = 5
"""Calls in one upload: two files, the manifest, the folder, the folder of all objects."""


def refusing(
    call: Callable[..., Any], code: int, turns: range
) -> tuple[Callable[..., Any], list[int]]:
    """Returns `call` made to fail at the given calls, and the list of its calls."""
    had: list[int] = []

    def maybe(*args: Any) -> Any:
        had.append(len(had))
        if had[-1] in turns:
            raise OSError(code, os.strerror(code))
        return call(*args)

    return maybe, had


def check_full(error: StoreFull, store: Path) -> None:
    assert "disk" in str(error)
    assert error.field == "store_dir"
    assert staged(store) == []


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT])
@pytest.mark.parametrize("for_good", [False, True])
@pytest.mark.parametrize("turn", range(SYNCS))
def test_no_room_to_sync(
    registry: AdapterRegistry,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    turn: int,
    for_good: bool,
    code: int,
) -> None:
    kept = push(registry, "kept", seed=1).record
    turns = range(turn, ALWAYS.stop if for_good else turn + 1)
    fsync, had = refusing(os.fsync, code, turns)
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", fsync)
        with pytest.raises(StoreFull) as caught:
            push(registry, "tone")
    assert len(had) > turn
    check_full(caught.value, tmp_path / "store")
    assert objects(tmp_path / "store") == {kept.digest}
    registry.check_integrity()
    done = push(registry, "tone")
    assert done.created
    assert registry.programs.program(done.record.digest).digest == done.record.digest


def test_no_room_to_write_an_uploaded_file(registry: AdapterRegistry, tmp_path: Path) -> None:
    contents = files()
    with registry.intake.stage(specs(contents)) as staging:
        (staging.directory / WEIGHTS).symlink_to("/dev/full")
        staging.write(0, 0, contents[CONFIG])
        with pytest.raises(StoreFull) as caught:
            staging.write(1, 0, contents[WEIGHTS])
    check_full(caught.value, tmp_path / "store")
    assert push(registry, "tone").created


def test_a_chunk_that_found_no_room_can_be_sent_again(
    registry: AdapterRegistry, monkeypatch: pytest.MonkeyPatch
) -> None:
    contents = files()
    write_at, left = os.pwrite, 700

    def until_full(descriptor: int, data: bytes, offset: int) -> int:
        nonlocal left
        if not left:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        written = write_at(descriptor, data[: min(left, 300)], offset)
        left -= written
        return written

    with registry.intake.stage(specs(contents)) as staging:
        for index, content in enumerate(contents.values()):
            with monkeypatch.context() as patch:
                patch.setattr(os, "pwrite", until_full)
                if index == 1:
                    with pytest.raises(StoreFull):
                        staging.write(index, 0, content)
            staging.write(index, 0, content)
        digest = registry.intake.commit(staging, "tone", replace=False, origin=UPLOAD).record.digest
    assert registry.programs.program(digest).digest == digest


def test_no_room_to_stage(
    registry: AdapterRegistry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(os, "mkdir", refusing(os.mkdir, errno.ENOSPC, ALWAYS)[0])
        with pytest.raises(StoreFull) as caught:
            registry.intake.stage(specs(files()))
    check_full(caught.value, tmp_path / "store")
    assert push(registry, "tone").created


def test_no_room_to_import(
    registry: AdapterRegistry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = write(tmp_path / "source", files())
    load = partial(make_importer(registry, [tmp_path]).load, str(source), "tone", origin=UPLOAD)
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", refusing(os.fsync, errno.ENOSPC, ALWAYS)[0])
        with pytest.raises(StoreFull) as caught:
            load(replace=False)
    check_full(caught.value, tmp_path / "store")
    assert load(replace=False).created


def test_no_room_in_the_catalog(registry: AdapterRegistry, tmp_path: Path) -> None:
    push(registry, "kept", seed=100)
    database = registry.names._catalog._writer  # type: ignore[attr-defined]
    (most,) = database.execute("PRAGMA max_page_count").fetchone()
    (pages,) = database.execute("PRAGMA page_count").fetchone()
    database.execute(f"PRAGMA max_page_count = {pages}")

    def fill() -> None:
        for seed in range(1000):
            push(registry, f"{seed:0120}", seed=seed)

    with pytest.raises(StoreFull) as caught:
        fill()
    check_full(caught.value, tmp_path / "store")
    named = {record.digest for record in records(registry)}
    assert objects(tmp_path / "store") == named
    registry.check_integrity()
    database.execute(f"PRAGMA max_page_count = {most}")
    assert push(registry, "tone").created


def test_other_errors_of_the_disk_stay_what_they_are(
    registry: AdapterRegistry, monkeypatch: pytest.MonkeyPatch
) -> None:
    contents = files(weights=tensors(seed=1))
    with stage(registry, contents) as staging, monkeypatch.context() as patch:
        patch.setattr(os, "fsync", refusing(os.fsync, errno.EIO, ALWAYS)[0])
        with pytest.raises(OSError, match=os.strerror(errno.EIO)):
            registry.intake.commit(staging, "tone", replace=False, origin=UPLOAD)
