"""Building and loading the C kernels.

The compiler of the machine builds for the processor of the machine, once: the result is cached
under a hash of sources, flags, compiler and processor. Without a compiler the reference serves.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from pathlib import Path

HERE = Path(__file__).parent
SOURCE = "low_rank.c"
FLAGS = ("-O3", "-march=native", "-std=gnu11", "-shared", "-fPIC")
BUILD_SECONDS = 120
SIGNATURES = ("bf16_low_rank", "f32_low_rank")


class BuildFailed(Exception):
    """The kernels cannot be built or loaded here."""


def load_library(cache: Path) -> ctypes.CDLL:
    """The kernels as a library, built into `cache` if need be. Raises BuildFailed."""
    compiler = os.environ.get("CC") or shutil.which("cc") or shutil.which("gcc")
    if compiler is None or shutil.which(compiler) is None:
        raise BuildFailed("there is no C compiler (cc, gcc or $CC)")
    target = cache / "kernels" / f"{_key(compiler)}.so"
    try:
        if not target.exists():
            _build(compiler, target)
        library = ctypes.CDLL(str(target))
    except (OSError, subprocess.SubprocessError) as error:
        raise BuildFailed(f"{compiler}: {error}") from error
    for name in SIGNATURES:
        pointer, long = ctypes.c_void_p, ctypes.c_long
        function = getattr(library, name)
        function.argtypes = [
            *(pointer, long, long, pointer, long, long),
            *(pointer, pointer, long),
        ]
        function.restype = ctypes.c_int
    return library


def _build(compiler: str, target: Path) -> None:
    """Compiles next to the target and renames, so that nobody loads half a library."""
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent) as work:
        built = Path(work) / "kernels.so"
        done = subprocess.run(
            [compiler, *FLAGS, "-o", str(built), str(HERE / SOURCE)],
            capture_output=True,
            text=True,
            timeout=BUILD_SECONDS,
        )
        if done.returncode:
            raise BuildFailed(f"{compiler} ended with {done.returncode}: {done.stderr[:500]}")
        built.rename(target)


def _key(compiler: str) -> str:
    """What the library depends on, as a hash."""
    total = hashlib.sha256()
    for path in sorted(HERE.glob("*.[ch]")):
        total.update(path.read_bytes())
    version = subprocess.run([compiler, "--version"], capture_output=True, timeout=BUILD_SECONDS)
    total.update("\0".join([compiler, *FLAGS, platform.machine(), _processor()]).encode())
    total.update(version.stdout)
    return total.hexdigest()[:32]


def _processor() -> str:
    """The instruction sets that the processor says it has."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:  # not Linux
        return platform.processor()
    return next((line for line in lines if line.startswith(("flags", "Features"))), "")
