"""The names that transformers' model modules define, saved between starts."""

from __future__ import annotations

import json
from pathlib import Path
from types import ModuleType

import pytest
from transformers.utils import import_utils

from adaplex.model.imports import class_table
from adaplex.model.imports.class_table import ClassTable, Names

NAMES: Names = {frozenset(): {"a.b": {"A"}, "c": set()}, frozenset({"torch", "x"}): {"d": {"D"}}}


class FakeImportUtils(ModuleType):
    """Stands for transformers.utils.import_utils; `scanned` has the folders that were read."""

    def __init__(self, root: Path) -> None:
        super().__init__("import_utils")
        if not (root / "models").exists():
            (root / "models").mkdir()
            (root / "__init__.py").touch()
        self.__file__ = str(root / "utils" / "import_utils.py")
        self.models = root / "models"
        self.scanned: list[Path] = []

    def define_import_structure(self, path: Path, prefix: str | None = None) -> Names:
        self.scanned.append(path)
        return NAMES


@pytest.fixture
def fake(tmp_path: Path) -> FakeImportUtils:
    return FakeImportUtils(tmp_path)


def read(fake: FakeImportUtils, cache: Path) -> Names:
    """The table as a new process gets it."""
    renewed = FakeImportUtils(fake.models.parent)
    renewed.scanned = fake.scanned
    ClassTable(cache).install(renewed)
    assert renewed.define_import_structure(renewed.models, prefix="m") == {
        libraries: {f"m.{module}": names for module, names in modules.items()}
        for libraries, modules in NAMES.items()
    }
    return renewed.define_import_structure(renewed.models / "__init__.py")


def test_the_files_are_read_once(fake: FakeImportUtils, tmp_path: Path) -> None:
    cache = tmp_path / "not" / "there"
    for _ in range(2):
        assert read(fake, cache) == NAMES
        assert fake.scanned == [fake.models]


def test_the_table_is_a_copy_each_time(fake: FakeImportUtils, tmp_path: Path) -> None:
    ClassTable(tmp_path).install(fake)
    fake.define_import_structure(fake.models)[frozenset()].clear()
    assert fake.define_import_structure(fake.models) == NAMES


def test_the_files_are_read_again_when_they_change(fake: FakeImportUtils, tmp_path: Path) -> None:
    read(fake, tmp_path)
    (fake.models / "new").mkdir()
    assert read(fake, tmp_path) == NAMES
    assert fake.scanned == [fake.models] * 2


@pytest.mark.parametrize("damage", ["", "[]", '{"of": 1}', '{"of": "same", "names": [[1]]}'])
def test_a_damaged_table_is_replaced(
    damage: str, fake: FakeImportUtils, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(class_table, "_stamp", lambda _: "same")
    (tmp_path / class_table.FILE).write_text(damage)
    assert read(fake, tmp_path) == NAMES
    assert json.loads((tmp_path / class_table.FILE).read_text())["of"] == "same"


def test_a_cache_that_cannot_be_written_costs_time_only(
    fake: FakeImportUtils, tmp_path: Path
) -> None:
    (tmp_path / "file").touch()
    for reads in (1, 2):
        assert read(fake, tmp_path / "file" / "cache") == NAMES
        assert len(fake.scanned) == reads


def test_other_folders_are_read_by_transformers(fake: FakeImportUtils, tmp_path: Path) -> None:
    ClassTable(tmp_path).install(fake)
    fake.define_import_structure(fake.models / "llama", prefix=None)
    assert fake.scanned == [fake.models / "llama"]


def test_the_table_of_the_installed_transformers_is_the_one_that_it_makes(tmp_path: Path) -> None:
    models = Path(import_utils.__file__).parents[1] / "models"
    scan = import_utils.define_import_structure.__wrapped__  # transformers changes what it caches
    expected = scan(models, prefix="models")
    for _ in range(2):  # scanned, then saved
        copy = ModuleType("copy")
        vars(copy).update(vars(import_utils), define_import_structure=scan)
        ClassTable(tmp_path).install(copy)
        assert copy.define_import_structure(models, prefix="models") == expected
