"""Loading of the C kernels.

The machine's C compiler builds them once for one of the instruction sets; the library is cached
under a hash of sources, flags and processor features, and one of the compiler. An installed wheel
has them built. Without either the reference kernels serve.
"""

from __future__ import annotations

import ctypes
import hashlib
import math
import platform
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path

from filelock import FileLock

from adaplex.model.kernels.native import layouts, structs
from adaplex.model.kernels.native.build import (
    FLAGS,
    HERE,
    BuildFailed,
    build,
    compiler_version,
    find_compiler,
)
from adaplex.model.kernels.native.instruction_sets import (
    InstructionSet,
    chosen_set,
    processor_features,
)
from adaplex.model.kernels.native.patient_build import PatientBuild
from adaplex.model.kernels.native.seal import is_intact
from adaplex.model.progress import Progress, silent

NO_MEMORY = 1
ERRORS = {
    NO_MEMORY: "no memory for the step",
    2: "a token is not in the vocabulary",
    3: "a position is out of range or not the next one",
    4: "a block is not in the cache",
    5: "rows, runs or sequences do not cover the step",
}
"""Text of the kernels' return codes, which types.h numbers."""
PREBUILT = HERE / "prebuilt"
"""Folder of a wheel's libraries, one for each instruction set."""


def load_library(
    cache: Path,
    instructions: InstructionSet | None = None,
    progress: Progress = silent,
    patience: float = math.inf,
) -> ctypes.CDLL:
    """Returns the library for an instruction set, by default `chosen_set()`: that of the wheel,
    or of `cache`, where it is built if it is missing, which `progress` reports. Raises BuildFailed,
    also if its structs differ from structs.py, or if it is not built after `patience` seconds.
    """
    chosen = instructions or chosen_set()
    path = PREBUILT / f"{chosen.name}.so"
    if not _is_usable(path, progress):
        path = _cached(cache / "kernels", chosen, progress, patience)
    try:
        library = ctypes.CDLL(str(path))
    except OSError as error:
        raise BuildFailed(f"{path} cannot be loaded: {error}") from error
    if mismatch := layouts.first_mismatch(library):
        raise BuildFailed(f"the struct layouts of C and Python differ: {mismatch}")
    _declare(library)
    return library


def _cached(folder: Path, chosen: InstructionSet, progress: Progress, patience: float) -> Path:
    """Returns the library in the cache; builds it if it is missing. Without a compiler the newest
    one that any compiler built of these sources serves. A build that failed is not tried again
    with the same compiler until its note is removed. Raises BuildFailed.
    """
    sources = _hash_of_sources(chosen)
    compiler = find_compiler()
    if compiler is None:
        found = sorted(folder.glob(f"{sources}-*.so"), key=lambda path: path.stat().st_mtime)
        built = [path for path in found if _is_usable(path, progress)]
        if not built:
            raise BuildFailed("there is no C compiler (cc, gcc, $CC, or PyPI's ziglang)")
        return built[-1]
    try:
        version = hashlib.sha256(" ".join(compiler).encode() + compiler_version(compiler))
        target = folder / f"{sources}-{version.hexdigest()[:16]}.so"
        if not _is_usable(target, progress):
            building = PatientBuild(lambda report: _build(compiler, chosen, target, report))
            building.wait(patience, progress)
    except (OSError, subprocess.SubprocessError) as error:
        raise BuildFailed(f"{compiler[0]}: {error}") from error
    return target


def _is_usable(library: Path, progress: Progress) -> bool:
    """Returns True if a library exists and is as it was built; logs it if it is not."""
    if not library.exists():
        return False
    if not (intact := is_intact(library)):
        progress(f"{library} is damaged, or was built by an earlier version: it is not loaded")
    return intact


def _build(
    compiler: Sequence[str],
    chosen: InstructionSet,
    target: Path,
    progress: Progress,
) -> None:
    """Builds `target`. Of several processes one builds, and the others wait. Raises BuildFailed."""
    target.parent.mkdir(parents=True, exist_ok=True)
    failed = target.with_suffix(".failed")
    with FileLock(target.parent / ".lock"):
        if target.exists() and is_intact(target):
            return
        if failed.exists():
            raise BuildFailed(f"{failed.read_text().strip()}; remove {failed} to try again")
        progress(f"building the {chosen.name} kernels with {compiler[0]}, once")
        start = time.monotonic()
        try:
            build(compiler, chosen, target.with_suffix(""), target, progress)
        except BuildFailed as error:
            failed.write_text(f"{error}\n")
            raise
        progress(f"built the kernels in {time.monotonic() - start:.0f} s")


def _declare(library: ctypes.CDLL) -> None:
    """Sets the signatures of the library's functions."""
    address, integer = structs.Address, structs.Integer
    rows = (address, integer)
    signatures = {
        "forward": [ctypes.POINTER(structs.Model), ctypes.POINTER(structs.Step)],
        "linear": [ctypes.POINTER(structs.Weight), *rows, integer, *rows],
        "low_rank": [*rows, integer, *rows, integer, address, address, integer],
    }
    for name, arguments in signatures.items():
        for element in ("f32", "bf16"):
            function = getattr(library, f"{element}_{name}")
            function.argtypes, function.restype = arguments, ctypes.c_int
    for name, arguments, result in (
        ("pack_dense", [address, integer, integer, integer, address], None),
        ("pack_codes", [address, integer, integer, address], None),
        ("unpack_codes", [address, integer, integer, address], None),
        ("pack_groups", [address, integer, integer, address], None),
        ("pack_low_rank", [address, integer, integer, integer, address], None),
        ("team_resize", [ctypes.c_int], ctypes.c_int),
    ):
        function = getattr(library, name)
        function.argtypes, function.restype = arguments, result


def _hash_of_sources(instructions: InstructionSet) -> str:
    """Returns a hash of everything that the library depends on besides the compiler."""
    total = hashlib.sha256()
    for path in sorted(HERE.glob("*.[ch]")):
        total.update(path.read_bytes())
    parts = [*FLAGS, *instructions.flags, platform.machine(), *processor_features()]
    total.update("\0".join(sorted(parts)).encode())
    return total.hexdigest()[:32]
