"""Building and loading of the C kernels.

The machine's C compiler builds them once for one of the instruction sets; the library is cached
under a hash of sources, flags, compiler and processor features. The set is chosen when the library
is loaded, by the features of the processor. Without a compiler the reference kernels serve.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import shutil
import signal
import subprocess
import tempfile
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock

from adaplex.model.kernels.native import layouts, structs

HERE = Path(__file__).parent
SOURCE = "kernels.c"
FLAGS = ("-O3", "-std=gnu11", "-shared", "-fPIC", "-pthread", "-Wno-psabi")
BUILD_CPU_SECONDS = 600
"""Limit of CPU seconds of each process of the compiler; a busy machine does not abort a build."""
BOUNDED = """
ulimit -t {seconds}
exec 3<&0
(cat <&3 >/dev/null; kill -KILL 0) &
exec "$@" 3<&- </dev/null
"""
"""Shell script that runs a command with limited CPU seconds, and kills its own process group when
stdin ends: the other side of that pipe is closed when the process that holds it dies."""
VERSION_SECONDS = 60
"""Seconds of wall time in which a compiler must print its version."""
NO_MEMORY = 1
ERRORS = {
    NO_MEMORY: "no memory for the step",
    2: "a token is not in the vocabulary",
    3: "a position is out of range or not the next one",
    4: "a block is not in the cache",
    5: "rows, runs or sequences do not cover the step",
}
"""Text of the kernels' return codes, which types.h numbers."""


class BuildFailed(Exception):
    """The kernels cannot be built or loaded on this machine."""


@dataclass(frozen=True)
class InstructionSet:
    """Compiler flags, and the processor features that their code needs."""

    name: str
    needs: frozenset[str]
    flags: tuple[str, ...]

    @property
    def usable(self) -> bool:
        """True if this processor has all needed features."""
        return self.needs <= processor_features()


INSTRUCTION_SETS = (
    InstructionSet(
        "avx512-bf16",
        frozenset({"avx512_bf16", "avx512bw", "avx512vl", "avx512dq", "avx2", "fma"}),
        (
            *("-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mavx512bf16"),
            *("-mavx2", "-mfma", "-mprefer-vector-width=512"),
        ),
    ),
    InstructionSet("avx2", frozenset({"avx2", "fma"}), ("-mavx2", "-mfma")),
    InstructionSet("portable", frozenset(), ()),
)
"""Fastest first."""


def processor_features() -> frozenset[str]:
    """Returns the features of the processor by their names in /proc/cpuinfo; empty if not Linux."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:  # not Linux
        return frozenset()
    line = next((line for line in lines if line.startswith(("flags", "Features"))), "")
    return frozenset(line.partition(":")[2].split())


def load_library(cache: Path, instructions: InstructionSet | None = None) -> ctypes.CDLL:
    """Returns the library for an instruction set, the fastest usable one by default; builds it in
    `cache` if it is not there. Raises BuildFailed, also if its structs differ from structs.py.
    """
    chosen = instructions or next(each for each in INSTRUCTION_SETS if each.usable)
    compiler = os.environ.get("CC") or shutil.which("cc") or shutil.which("gcc")
    if compiler is None or shutil.which(compiler) is None:
        raise BuildFailed("there is no C compiler (cc, gcc or $CC)")
    try:
        target = cache / "kernels" / f"{_key(compiler, chosen)}.so"
        if not target.exists():
            _build(compiler, chosen, target)
        library = ctypes.CDLL(str(target))
    except (OSError, subprocess.SubprocessError) as error:
        raise BuildFailed(f"{compiler}: {error}") from error
    if mismatch := layouts.first_mismatch(library):
        raise BuildFailed(f"the struct layouts of C and Python differ: {mismatch}")
    _declare(library)
    return library


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
        ("pack_groups", [address, integer, integer, address], None),
        ("pack_low_rank", [address, integer, integer, integer, address], None),
        ("team_resize", [ctypes.c_int], ctypes.c_int),
    ):
        function = getattr(library, name)
        function.argtypes, function.restype = arguments, result


def _build(compiler: str, instructions: InstructionSet, target: Path) -> None:
    """Compiles beside the target and renames, so that no process loads a partial file. Of several
    processes one builds, and the others wait.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(target.parent / ".lock")
    with lock, tempfile.TemporaryDirectory(dir=target.parent) as work:
        if target.exists():
            return
        built = Path(work) / "kernels.so"
        source = (str(HERE / SOURCE), "-lm")
        command = [compiler, *FLAGS, *instructions.flags, "-o", str(built), *source]
        errors = Path(work) / "stderr"
        if status := _run_bounded(command, errors):
            reason = errors.read_text(errors="replace")[:500]
            raise BuildFailed(f"{compiler} ended with {status}: {reason}")
        built.rename(target)


def _run_bounded(command: list[str], errors: Path) -> int:
    """Runs a command in its own process group, each process limited to BUILD_CPU_SECONDS, with
    stderr in a file; returns its exit status. All processes of the group are killed at the end,
    after an exception, and when this process dies.
    """
    bounded = ["sh", "-c", BOUNDED.format(seconds=BUILD_CPU_SECONDS), "sh", *command]
    with (
        errors.open("wb") as stderr,
        subprocess.Popen(
            bounded,
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=stderr,
            start_new_session=True,
        ) as process,
    ):
        try:
            return process.wait()
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)


def _key(compiler: str, instructions: InstructionSet) -> str:
    """Returns a hash of everything that the library depends on."""
    total = hashlib.sha256()
    for path in sorted(HERE.glob("*.[ch]")):
        total.update(path.read_bytes())
    version = subprocess.run([compiler, "--version"], capture_output=True, timeout=VERSION_SECONDS)
    parts = [compiler, *FLAGS, *instructions.flags, platform.machine(), *processor_features()]
    total.update("\0".join(sorted(parts)).encode())
    total.update(version.stdout)
    return total.hexdigest()[:32]
