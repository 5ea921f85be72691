"""Modules that are changed as soon as they have been imported."""

from __future__ import annotations

import sys
from importlib import import_module
from importlib.machinery import SourceFileLoader
from pathlib import Path
from types import ModuleType

import pytest

from adaplex.model.imports.edited_modules import EditedModules


def test_a_module_is_edited_after_its_import_and_others_are_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("edited", "plain"):
        (tmp_path / f"{name}_module.py").write_text("value = 1\n")

    def edit(module: ModuleType) -> None:
        vars(module)["value"] += 1

    monkeypatch.syspath_prepend(tmp_path)
    finder = EditedModules({"edited_module": edit, "missing_module": edit})
    monkeypatch.setattr(sys, "meta_path", [finder, *sys.meta_path])
    for name, value in (("edited_module", 2), ("plain_module", 1)):
        monkeypatch.delitem(sys.modules, name, raising=False)
        module = import_module(name)
        assert module.value == value
        assert isinstance(module.__loader__, SourceFileLoader)
        assert module.__spec__ is not None
        assert module.__spec__.loader is module.__loader__
    with pytest.raises(ModuleNotFoundError, match="missing_module"):
        import_module("missing_module")
