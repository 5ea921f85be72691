"""ClassTable: the names that transformers' model modules define, saved between starts.

transformers reads the source of all its model modules, some 2,000 files, to learn these names:
twice at each import. They change with its files only.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from tempfile import NamedTemporaryFile
from types import ModuleType

Names = dict[frozenset[str], dict[str, set[str]]]
"""Required libraries -> module -> names, as `define_import_structure` returns it."""
FILE = "transformers-classes.json"
"""Name of the file in the cache folder."""


class ClassTable:
    """The names of one folder of modules, read once in a process and once in a cache."""

    def __init__(self, cache: Path) -> None:
        self._file = cache / FILE
        self._known: Names | None = None

    def install(self, import_utils: ModuleType) -> None:
        """Replaces `define_import_structure` of transformers' import_utils, which reads the files,
        by one that reads them if the table is not known.
        """
        models = Path(str(import_utils.__file__)).parents[1] / "models"
        scan: Callable[..., Names] = import_utils.define_import_structure

        def define_import_structure(module_path: str | Path, prefix: str | None = None) -> Names:
            if Path(module_path) not in (models, models / "__init__.py"):
                return scan(module_path, prefix)
            if self._known is None:
                self._known = self._read(models) or self._store(models, scan(models))
            begin = "" if prefix is None else f"{prefix}."
            return {
                libraries: {f"{begin}{module}": set(names) for module, names in modules.items()}
                for libraries, modules in self._known.items()
            }

        vars(import_utils)["define_import_structure"] = define_import_structure

    def _read(self, models: Path) -> Names | None:
        """Returns the saved table; None if it is missing, damaged or of other files."""
        try:
            saved = json.loads(self._file.read_text())
            if saved["of"] != _stamp(models):
                return None
            return {
                frozenset(libraries): {module: set(names) for module, names in modules.items()}
                for libraries, modules in saved["names"]
            }
        except (OSError, ValueError, LookupError, TypeError, AttributeError):
            return None

    def _store(self, models: Path, names: Names) -> Names:
        """Saves the table, if the cache can be written, and returns it."""
        listed = [
            [sorted(libraries), {module: sorted(each) for module, each in modules.items()}]
            for libraries, modules in names.items()
        ]
        with suppress(OSError):
            self._file.parent.mkdir(parents=True, exist_ok=True)
            with NamedTemporaryFile("w", dir=self._file.parent, delete=False) as new:
                json.dump({"of": _stamp(models), "names": listed}, new)
                os.fchmod(new.fileno(), 0o644)
            os.replace(new.name, self._file)
        return names


def _stamp(models: Path) -> list[object]:
    """Returns what changes when the files are installed anew, or one is added or removed."""
    stats = [each.stat() for each in (models, models.parent / "__init__.py")]
    return [str(models), sys.version, *([s.st_mtime_ns, s.st_ino] for s in stats)]
