"""Build hook of hatchling: puts the C kernels of every instruction set into the wheel.

`make wheel` sets ADAPLEX_WHEEL_PLATFORM, the wheel's platform; without it, as in an editable
install or a build from source, the wheel is pure Python, and the kernels are built at the first
start.
"""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

PLATFORM = "ADAPLEX_WHEEL_PLATFORM"
"""Environment variable with the wheel's platform tag, such as linux_x86_64."""
PLACE = "adaplex/model/kernels/native/prebuilt"
"""Folder of the libraries in the wheel."""


class KernelsHook(BuildHookInterface[Any]):
    """Builds a library for each instruction set with the compiler that the server would take."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Adds the libraries and the platform tag to the wheel. Raises BuildFailed."""
        platform = os.environ.get(PLATFORM)
        if not platform or self.target_name != "wheel" or version == "editable":
            return
        sys.path[:0] = [str(Path(self.root) / part) for part in ("server", "adapters")]
        from adaplex.model.kernels.native.build import build, find_compiler
        from adaplex.model.kernels.native.instruction_sets import INSTRUCTION_SETS

        compiler = find_compiler()
        if compiler is None:
            raise RuntimeError("a wheel with kernels needs a C compiler (cc, gcc or $CC)")
        work = Path(self.directory) / "kernels"
        shutil.rmtree(work, ignore_errors=True)
        for each in INSTRUCTION_SETS:
            library = work / f"{each.name}.so"
            build(compiler, each, work / each.name, library)
            build_data["force_include"][str(library)] = f"{PLACE}/{each.name}.so"
        build_data["pure_python"] = False
        build_data["tag"] = f"py3-none-{platform}"
