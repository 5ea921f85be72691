"""Files under allowed roots are opened once, without following links and without waiting."""

from __future__ import annotations

import os
import shutil
import socket
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from adaplex.adapters.checkpoint import CONFIG, SIGNATURE, WEIGHTS
from adaplex.adapters.errors import AdapterInvalid
from adaplex.adapters.sources.directory import DirectorySource
from adaplex.adapters.sources.open_beneath import NotRegular, opened_beneath
from adapters.handmade import files, make_sources, tensors, write

TRIES = 150


def fifo(path: Path) -> None:
    os.mkfifo(path)


def listening(path: Path) -> None:
    here = os.getcwd()
    os.chdir(path.parent)  # a socket's path has at most 107 bytes
    try:
        with socket.socket(socket.AF_UNIX) as made:
            made.bind(path.name)
    finally:
        os.chdir(here)


OTHERS: list[tuple[Callable[[Path], None], str]] = [
    (fifo, "is a FIFO"),
    (Path.mkdir, "is a directory"),
    (listening, "is a socket"),
    (lambda path: path.symlink_to("/dev/zero"), "is a link that leads out of --adapter-roots"),
    (lambda path: path.symlink_to(path.name), "cannot be read: "),
    (lambda path: path.symlink_to("gone"), "cannot be read: "),
]


@pytest.mark.parametrize("name", [CONFIG, WEIGHTS, SIGNATURE])
@pytest.mark.parametrize(("make", "reason"), OTHERS, ids=[reason for _, reason in OTHERS])
def test_only_regular_files_are_read(
    make: Callable[[Path], None], reason: str, name: str, tmp_path: Path
) -> None:
    folder, into = write(tmp_path / "a", files()), tmp_path / "into"
    into.mkdir()
    (folder / name).unlink(missing_ok=True)
    make(folder / name)
    with pytest.raises(AdapterInvalid, match=reason) as caught:
        make_sources(tmp_path).fetch(str(folder), into)
    assert caught.value.field == name


@pytest.mark.parametrize("name", ["it", "it.gguf"])
def test_a_uri_of_a_fifo_is_refused(name: str, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / name)
    with pytest.raises(AdapterInvalid, match=r"is a FIFO; it must be a directory or a .gguf file"):
        make_sources(tmp_path).fetch(str(tmp_path / name), tmp_path)


def test_a_device_is_not_opened() -> None:
    with pytest.raises(NotRegular, match="a device"), opened_beneath(Path("/"), Path("/dev/zero")):
        pass


@pytest.mark.parametrize("swapped", ["", CONFIG, WEIGHTS, "parent"])
def test_what_is_swapped_after_the_check_is_not_read(
    swapped: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root, outside = tmp_path / "root", tmp_path / "outside"
    folder = write(root / "parent" / "a", files())
    write(outside, files(weights=tensors(seed=1)))
    write(outside / "a", files(weights=tensors(seed=1)))
    into = tmp_path / "into"
    into.mkdir()
    inside = DirectorySource._inside

    def swap(source: DirectorySource, real: Path) -> bool:
        found = inside(source, real)
        target = folder.parent if swapped == "parent" else folder / swapped
        if not target.is_symlink():
            target.rename(tmp_path / "moved")
            target.symlink_to(outside / swapped if swapped != "parent" else outside)
        return found

    monkeypatch.setattr(DirectorySource, "_inside", swap)
    with pytest.raises(AdapterInvalid):
        make_sources(root).fetch(str(folder), into)
    for file in into.iterdir():
        assert file.read_bytes() != (outside / file.name).read_bytes() or file.name == CONFIG


def test_a_file_that_is_swapped_all_the_time(tmp_path: Path) -> None:
    folder = write(tmp_path / "root" / "a", files())
    outside = write(tmp_path / "outside", files(weights=tensors(seed=1)))
    own, others = folder / WEIGHTS, outside / WEIGHTS
    secret, ended = others.read_bytes(), threading.Event()
    spare, link = tmp_path / "spare", tmp_path / "link"
    shutil.copy(own, spare)

    def swap() -> None:
        while not ended.is_set():
            link.symlink_to(others)
            link.replace(own)
            os.link(spare, link)
            link.replace(own)

    swapper = threading.Thread(target=swap)
    swapper.start()
    try:
        loaded = 0
        for number in range(TRIES):
            into = tmp_path / str(number)
            into.mkdir()
            try:
                make_sources(tmp_path / "root").fetch(str(folder), into)
            except AdapterInvalid:
                continue
            loaded += 1
            assert (into / WEIGHTS).read_bytes() != secret
    finally:
        ended.set()
        swapper.join()
    assert loaded > 0
