"""A catalog that is lost, older or damaged loses no content, and is made whole from its copies."""

from __future__ import annotations

import logging
import shutil
import sqlite3
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

import pytest

from adaplex.adapters.errors import AdapterNotFound, CatalogCorrupt, CatalogOutdated
from adaplex.adapters.registry.registry import AdapterRegistry
from adaplex.adapters.storage.copied_catalog import CATALOG, COPIES, CopiedCatalog, restore
from adaplex.adapters.storage.event import Origin
from adaplex.adapters.storage.folder_content import FolderContent, is_used
from adaplex.adapters.storage.fsck import check_store
from adapters.damaged_catalog import overwrite_pages
from adapters.handmade import files, make_registry, push, tensors

ORIGIN = Origin(datetime(2026, 12, 1, tzinfo=UTC), actor="test")


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A store with the names a, with two versions and an alias, b, and c, which is deleted."""
    registry = make_registry(tmp_path)
    push(registry, "a")
    backup(tmp_path)
    push(registry, "a", files(weights=tensors(seed=1)), replace=True)
    push(registry, "b", files(weights=tensors(seed=2)))
    push(registry, "c", files(weights=tensors(seed=3)))
    registry.names.delete("c", ORIGIN)
    registry.close()
    return tmp_path


def backup(root: Path) -> None:
    with sqlite3.connect(root / CATALOG) as db, sqlite3.connect(root / "backup") as copy:
        db.backup(copy)
    db.close()
    copy.close()


def drop_catalog(root: Path) -> None:
    for path in root.glob(f"{CATALOG}*"):
        path.unlink()


def lose(root: Path) -> None:
    drop_catalog(root)


def go_back(root: Path) -> None:
    drop_catalog(root)
    shutil.copy(root / "backup", root / CATALOG)


def scribble(root: Path) -> None:
    """Overwrites all pages but the first, as a failing disk does."""
    with sqlite3.connect(root / CATALOG) as db:
        db.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    db.close()
    data = (root / CATALOG).read_bytes()
    (root / CATALOG).write_bytes(data[:4096] + bytes([0xA5]) * (len(data) - 4096))


def no_database(root: Path) -> None:
    drop_catalog(root)
    (root / CATALOG).write_bytes(b"not a database" * 99)


def objects(root: Path) -> set[str]:
    return {path.name for path in (root / "objects").iterdir()}


def names(registry: AdapterRegistry) -> dict[str, int]:
    """Returns the newest version of each name that has one."""
    return {n: registry.names.get(n).version for n in "abc" if registry.names.exists(n)}


def fsck(root: Path) -> list[str]:
    contents, catalog = FolderContent(root), CopiedCatalog(root)
    try:
        return [f"{each.kind}: {each.reason}" for each in check_store(catalog, contents)]
    finally:
        catalog.close()
        contents.close()


@pytest.mark.parametrize("harm", [lose, go_back])
def test_a_lost_or_older_catalog_deletes_nothing_and_is_restored(
    harm: Callable[[Path], None], root: Path, caplog: pytest.LogCaptureFixture
) -> None:
    before = objects(root)
    assert len(before) == 3
    harm(root)
    with caplog.at_level(logging.WARNING):
        registry = make_registry(root)
    assert "is new or older than its copies" in caplog.text
    registry.garbage.sweep()
    assert objects(root) == before
    with pytest.raises(CatalogOutdated, match="run adaplex adapters restore"):
        push(registry, "a", files(weights=tensors(seed=9)), replace=True)
    push(registry, "new", files(weights=tensors(seed=4)))
    registry.names.delete("new", ORIGIN)
    assert objects(root) == before
    registry.close()
    found = fsck(root)
    assert found[0].startswith("catalog: catalog.sqlite3 is new or older")
    assert any(line.startswith("lost: only a copy of its name refers to it") for line in found)

    assert restore(root).names == ("a", "b", "c")
    registry = make_registry(root)
    assert names(registry) == {"a": 2, "b": 1}
    assert registry.names.is_deleted("c")
    registry.garbage.sweep()
    registry.close()
    assert objects(root) == before
    assert fsck(root) == []


@pytest.mark.parametrize("harm", [scribble, no_database])
def test_a_damaged_catalog_is_named_and_restored(harm: Callable[[Path], None], root: Path) -> None:
    before = objects(root)
    harm(root)
    with pytest.raises(
        CatalogCorrupt, match=r"is damaged: .*run adaplex adapters restore"
    ) as error:
        make_registry(root)
    assert "\n" not in str(error.value)
    found = restore(root)
    assert found.moved is not None
    assert found.moved.exists()
    registry = make_registry(root)
    assert names(registry) == {"a": 2, "b": 1}
    registry.close()
    assert objects(root) == before


def test_an_empty_catalog_without_copies_collects_nothing(root: Path) -> None:
    before = objects(root)
    lose(root)
    shutil.rmtree(root / COPIES)
    registry = make_registry(root)
    assert registry.garbage.sweep() == frozenset()
    registry.close()
    assert objects(root) == before
    assert fsck(root)[0] == "catalog: it is empty, and there are 3 contents"


def test_copies_that_are_missing_older_or_damaged_are_written_by_the_next_opener(
    root: Path,
) -> None:
    copies = root / COPIES
    expected = {path.name: path.read_bytes() for path in copies.glob("*.json")}
    assert expected.keys() == {"a.json", "b.json", "c.json"}
    (copies / "a.json").write_bytes(expected["a.json"][:-9])
    (copies / "b.json").unlink()
    CopiedCatalog(root).close()
    assert {path.name: path.read_bytes() for path in copies.glob("*.json")} == expected


def test_a_copy_that_cannot_be_written_does_not_fail_the_change(
    root: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    registry = make_registry(root)

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("adaplex.adapters.storage.name_copies.NameCopies.write", full)
    registry.names.delete("b", ORIGIN)
    assert "b has no copy beside the contents yet" in caplog.text
    registry.close()
    monkeypatch.undo()
    CopiedCatalog(root).close()  # copies it now
    lose(root)
    restore(root)
    registry = make_registry(root)
    with pytest.raises(AdapterNotFound):
        registry.names.get("b")
    registry.close()


def test_a_catalog_that_is_removed_while_it_is_open_acknowledges_nothing(root: Path) -> None:
    registry = make_registry(root)
    assert registry.damage() == ""
    drop_catalog(root)
    with pytest.raises(CatalogCorrupt, match="was removed or replaced while it was open"):
        registry.names.delete("b", ORIGIN)
    assert "was removed" in registry.damage()
    registry.close()


def test_a_page_that_is_overwritten_while_it_is_open_is_named(root: Path) -> None:
    registry = make_registry(root)
    overwrite_pages(root)
    catalog = registry.names._catalog
    assert isinstance(catalog, CopiedCatalog)
    catalog._reader.execute("PRAGMA shrink_memory")
    with pytest.raises(CatalogCorrupt, match="is damaged: "):
        catalog.documents()
    assert "is damaged" in registry.damage()
    registry.close()


def test_a_store_in_use_is_known(root: Path) -> None:
    assert not is_used(root)
    registry = make_registry(root)
    assert is_used(root)
    registry.close()
    assert not is_used(root)
