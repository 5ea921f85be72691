"""Modules that are imported when something of them is read."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path

import pytest

from adaplex.model.imports.stand_ins import StandIn, StandIns, import_in_place

FILES = {
    "__init__": "",
    "other": "log = []",
    "slow/__init__": "from pack.other import log; log.append('slow'); from pack.slow import part",
    "slow/part": "value = 1",
    "slow/leaf": "value = 2",
    "compiler": "from pack.other import log; log.append('compiler'); value = 3",
}


@pytest.fixture
def pack(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[StandIns]:
    """A package in which two modules have stand-ins. `pack.other.log` lists what was executed."""
    for name, text in FILES.items():
        file = tmp_path / "pack" / f"{name}.py"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    stand_ins = StandIns(
        {"pack.slow": {"marker": "given"}, "pack.compiler": {}},
        leaves={"pack.slow.leaf"},
        first={"pack.compiler": "pack.slow"},
    )
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, "meta_path", [stand_ins, *sys.meta_path])
    yield stand_ins
    for name in [name for name in sys.modules if name.split(".")[0] == "pack"]:
        del sys.modules[name]


def executed() -> list[str]:
    """The executed parts, in order."""
    log: list[str] = import_module("pack.other").log
    return log


def test_a_stand_in_has_what_it_is_given_and_nothing_is_executed(pack: StandIns) -> None:
    slow = import_module("pack.slow")
    assert slow.marker == "given"
    assert not hasattr(slow, "__all__")
    assert isinstance(import_module("pack").slow, StandIn)
    assert executed() == []


def test_what_it_is_not_given_is_read_from_the_module_in_its_place(pack: StandIns) -> None:
    slow = import_module("pack.slow")
    assert slow.part.value == 1
    assert executed() == ["slow"]
    assert import_module("pack").slow is import_module("pack.slow") is not slow
    assert not hasattr(import_module("pack.slow"), "marker")


def test_a_submodule_imports_its_parent_unless_it_is_a_leaf(pack: StandIns) -> None:
    import_module("pack.slow")
    assert import_module("pack.slow.leaf").value == 2
    assert executed() == []
    assert import_module("pack.slow.part").value == 1
    assert executed() == ["slow"]


def test_a_module_imports_first_what_it_needs(pack: StandIns) -> None:
    import_module("pack.slow")
    assert import_module("pack.compiler").value == 3
    assert executed() == ["slow", "compiler"]


def test_what_is_forgotten_is_found_as_without_the_finder(pack: StandIns) -> None:
    import_module("pack.compiler")
    pack.forget("pack.compiler")
    assert not hasattr(import_module("pack"), "compiler")
    assert not isinstance(import_module("pack.compiler"), StandIn)
    assert executed() == ["slow", "compiler"]


def test_a_module_that_is_imported_already_stays(pack: StandIns) -> None:
    other = import_module("pack.other")
    sys.meta_path.insert(0, StandIns({"pack.other": {}}))
    assert import_in_place("pack.other") is import_module("pack.other") is other
