"""FolderContent: restarts, leftovers, and damaged or missing content."""

from __future__ import annotations

import shutil
import sqlite3
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from adaplex.adapters.checkpoint import CONFIG, WEIGHTS
from adaplex.adapters.errors import (
    AdapterError,
    AdapterExists,
    AdapterInvalid,
    AdapterNotFound,
    StoreCorrupt,
)
from adaplex.adapters.registry import intake
from adaplex.adapters.registry.registry import AdapterRegistry
from adaplex.adapters.storage.folder_content import FolderContent
from adapters.handmade import (
    BASE,
    UPLOAD,
    files,
    make_base,
    make_registry,
    object_folder,
    push,
    records,
    stage,
    staged,
    write,
)


def test_everything_is_found_after_a_restart(tmp_path: Path) -> None:
    registry = make_registry(tmp_path)
    made = [push(registry, f"tone-{i}", seed=i).record for i in range(3)]
    registry.names.delete("tone-0", UPLOAD)
    registry.close()
    registry = make_registry(tmp_path)
    assert records(registry) == made[1:]
    for record in made[1:]:
        assert registry.programs.program(record.digest).digest == record.digest
    assert push(registry, "tone-0").record.version == 2
    registry.check_integrity()
    registry.close()


def test_a_restart_in_another_dtype_keeps_the_sizes_right(tmp_path: Path) -> None:
    registry = make_registry(tmp_path)
    record = push(registry, "tone").record
    registry.close()
    registry = AdapterRegistry.local(tmp_path, BASE, element_bytes=2)
    assert (
        registry.names.get("tone").packed_bytes
        == registry.programs.report(record.digest).packed_bytes
    )
    registry.close()


def test_leftovers_are_removed_when_the_store_is_opened(tmp_path: Path) -> None:
    registry = make_registry(tmp_path)
    record = push(registry, "tone").record
    stage(registry, files())
    orphan = tmp_path / "objects" / ("0" * 64)
    write(orphan, files())
    (tmp_path / "objects" / "notes.txt").write_text("not an object")
    registry.close()
    registry = make_registry(tmp_path)
    assert staged(tmp_path) == []
    assert not orphan.exists()
    registry.check_integrity()
    assert registry.programs.program(record.digest).digest == record.digest
    registry.close()


@pytest.mark.parametrize("name", [CONFIG, WEIGHTS, "manifest.json"])
@pytest.mark.parametrize("damage", ["flip", "cut", "empty", "remove"])
def test_damaged_content_is_not_served_and_can_be_uploaded_again(
    registry: AdapterRegistry, tmp_path: Path, name: str, damage: str
) -> None:
    record = push(registry, "tone").record
    path = object_folder(tmp_path / "store", record.digest) / name
    data = path.read_bytes()
    if damage == "remove":
        path.unlink()
    elif damage == "flip":
        middle = data.index(b'"sha256":') + 13 if name == "manifest.json" else len(data) // 2
        path.write_bytes(data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :])
    else:
        path.write_bytes(data[: len(data) // 2] if damage == "cut" else b"")
    for read in (registry.programs.program, registry.programs.report):
        with pytest.raises(StoreCorrupt, match=record.digest):
            read(record.digest)
    assert push(registry, "tone").record == record
    assert registry.programs.program(record.digest).digest == record.digest


@pytest.mark.parametrize("restart", [False, True])
def test_lost_content_is_corrupt_and_can_be_uploaded_again(tmp_path: Path, restart: bool) -> None:
    registry = make_registry(tmp_path)
    record = push(registry, "tone").record
    shutil.rmtree(object_folder(tmp_path, record.digest))
    if restart:
        registry.close()
        registry = make_registry(tmp_path)
    for read in (registry.programs.program, registry.programs.report):
        with pytest.raises(StoreCorrupt, match=record.digest):
            read(record.digest)
    again = push(registry, "tone")
    assert (again.record, again.created) == (record, False)
    assert registry.programs.program(record.digest).digest == record.digest
    registry.check_integrity()
    assert staged(tmp_path) == []
    registry.close()


def test_lost_content_is_not_found_once_nobody_names_it(
    registry: AdapterRegistry, tmp_path: Path
) -> None:
    digest = push(registry, "tone").record.digest
    shutil.rmtree(object_folder(tmp_path / "store", digest))
    with registry.resolve("tone"):
        registry.names.delete("tone", UPLOAD)
        with pytest.raises(StoreCorrupt):
            registry.programs.program(digest)
    with pytest.raises(AdapterNotFound):
        registry.programs.program(digest)


def test_damaged_content_is_repaired_by_one_of_many(
    registry: AdapterRegistry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    digest = push(registry, "tone").record.digest
    (object_folder(tmp_path / "store", digest) / CONFIG).write_text("{}")
    workers = 4
    seen = threading.Barrier(workers)
    is_damaged, remove = intake.is_damaged, FolderContent.remove
    local, removed = threading.local(), []

    def seen_by_all(store: FolderContent, digest: str) -> bool:
        damaged = is_damaged(store, digest)
        if not getattr(local, "waited", False):
            local.waited = True
            seen.wait(30)
        return damaged

    def counted(store: FolderContent, digest: str, *, damaged: bool = False) -> bool:
        removed.append(digest)
        return remove(store, digest, damaged=damaged)

    monkeypatch.setattr(intake, "is_damaged", seen_by_all)
    monkeypatch.setattr(FolderContent, "remove", counted)
    with ThreadPoolExecutor(workers) as pool:
        done = list(pool.map(lambda _: push(registry, "tone"), range(workers)))
    assert not any(committed.created for committed in done)
    assert removed == [digest]
    assert registry.programs.program(digest).digest == digest


def test_a_refused_upload_leaves_damaged_content_alone(
    registry: AdapterRegistry, tmp_path: Path
) -> None:
    digest = push(registry, "tone").record.digest
    push(registry, "other", seed=1)
    path = object_folder(tmp_path / "store", digest) / CONFIG
    path.write_text("{}")
    with pytest.raises(AdapterExists):
        push(registry, "other")
    assert path.read_text() == "{}"
    assert push(registry, "other", replace=True).created
    assert registry.programs.program(digest).digest == digest


def test_content_for_another_base_is_invalid_not_corrupt(tmp_path: Path) -> None:
    registry = make_registry(tmp_path)
    digest = push(registry, "tone").record.digest
    registry.close()
    registry = make_registry(tmp_path, make_base("smaller", layers=1))
    assert registry.names.get("tone").digest == digest
    with pytest.raises(AdapterInvalid, match="the base smaller has no such module"):
        registry.programs.program(digest)
    registry.close()


def test_a_foreign_catalog_is_named(tmp_path: Path) -> None:
    registry = make_registry(tmp_path)
    registry.close()
    with sqlite3.connect(tmp_path / "catalog.sqlite3") as catalog:
        catalog.execute("PRAGMA user_version = 99")
    with pytest.raises(AdapterError, match="schema 99"):
        make_registry(tmp_path)
