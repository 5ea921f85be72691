"""Building of the C kernels: compiles the translation units side by side, and links them."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path
from queue import Empty, SimpleQueue
from threading import Thread

from adaplex.adapters.durable_files import sync
from adaplex.model.kernels.native.instruction_sets import InstructionSet
from adaplex.model.kernels.native.seal import seal
from adaplex.model.progress import Progress, silent

HERE = Path(__file__).parent
UNITS = ("bf16.c", "f32.c", "integers.c", "int8_head.c", "team.c", "packing.c")
"""The translation units, those that take longest first."""
FLAGS = ("-O3", "-std=gnu11", "-fPIC", "-pthread", "-Wno-psabi")
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


class BuildFailed(Exception):
    """The kernels cannot be built or loaded on this machine."""


def find_compiler() -> list[str] | None:
    """Returns the command of the C compiler: $CC, cc, gcc, or the one of PyPI's ziglang; None if
    there is none.
    """
    if named := os.environ.get("CC"):
        command = named.split()
        return command if command and shutil.which(command[0]) else None
    found = shutil.which("cc") or shutil.which("gcc")
    return [found] if found else _zig()


def compiler_version(compiler: Sequence[str]) -> bytes:
    """Returns what the compiler prints of itself. Raises OSError and SubprocessError."""
    command = [*compiler, "--version"]
    return subprocess.run(command, capture_output=True, timeout=VERSION_SECONDS).stdout


def build(
    compiler: Sequence[str],
    instructions: InstructionSet,
    objects: Path,
    target: Path,
    progress: Progress = silent,
) -> None:
    """Builds `target`, a sealed shared library, by way of `objects`, a folder that is left with
    what was compiled if the build fails, so that the next one goes on from there. Raises
    BuildFailed.
    """
    objects.mkdir(parents=True, exist_ok=True)
    flags = [*FLAGS, *instructions.flags]

    def compile_unit(unit: str) -> str:
        made = objects / f"{unit}.o"
        if not made.exists():
            partial = made.with_suffix(".partial")
            run([*compiler, *flags, "-c", "-o", str(partial), str(HERE / unit)], objects / unit)
            sync(partial)
            partial.rename(made)
            progress(f"compiled {unit}")
        return str(made)

    made = _side_by_side(compile_unit, UNITS)
    partial = objects / "kernels.so"
    run([*compiler, *flags, "-shared", "-o", str(partial), *made, "-lm"], objects / "link")
    seal(partial)
    partial.rename(target)
    shutil.rmtree(objects)


def _side_by_side(work: Callable[[str], str], items: Sequence[str]) -> list[str]:
    """Calls `work` with each item, on a thread for each core, and returns the results. Raises the
    first item's error of those that have one, when all are done.

    The threads do not keep the process alive, which ends its compilers: those of an executor would.
    """
    results: dict[str, str | BaseException] = {}
    waiting = SimpleQueue[str]()
    for item in items:
        waiting.put(item)

    def take_turns() -> None:
        with suppress(Empty):
            while True:
                item = waiting.get_nowait()
                try:
                    results[item] = work(item)
                except BaseException as error:
                    results[item] = error

    cores = len(os.sched_getaffinity(0))
    threads = [Thread(target=take_turns, daemon=True) for _ in range(min(cores, len(items)))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    made: list[str] = []
    for item in items:
        result = results[item]
        if isinstance(result, BaseException):
            raise result
        made.append(result)
    return made


def run(command: list[str], log: Path) -> None:
    """Runs a command of the compiler, with its stderr in a file. Raises BuildFailed."""
    errors = log.with_suffix(".stderr")
    if status := run_bounded(command, errors):
        reason = errors.read_text(errors="replace")[:500]
        raise BuildFailed(f"{command[0]} ended with {status}: {reason}")


def run_bounded(command: list[str], errors: Path) -> int:
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


def _zig() -> list[str] | None:
    """Returns the command of the compiler in PyPI's ziglang, if that is installed."""
    if find_spec("ziglang") is None:
        return None
    return [sys.executable, "-m", "ziglang", "cc"]
