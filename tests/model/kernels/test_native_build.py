"""How the C kernels are built, kept and found again."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from adaplex.model.kernels.low_rank import ReferenceLowRank
from adaplex.model.kernels.native import build, instruction_sets, library, seal
from adaplex.model.kernels.native.build import BuildFailed
from adaplex.model.kernels.native.instruction_sets import (
    INSTRUCTION_SETS,
    VARIABLE,
    UnknownInstructionSet,
    chosen_set,
    usable_sets,
)
from adaplex.model.select import low_rank_kernel, native_kernels


@pytest.fixture
def small_sources(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Two translation units in place of the kernels, which are loaded without being compared."""
    sources = tmp_path / "sources"
    sources.mkdir()
    (sources / "one.c").write_text("int one(void) { return 1; }\n")
    (sources / "two.c").write_text("int two(void) { return 2; }\n")
    for module in (build, library):
        monkeypatch.setattr(module, "HERE", sources)
    monkeypatch.setattr(library, "PREBUILT", sources / "prebuilt")
    monkeypatch.setattr(build, "UNITS", ("one.c", "two.c"))
    monkeypatch.setattr(library.layouts, "first_mismatch", lambda _: None)
    monkeypatch.setattr(library, "_declare", lambda _: None)
    return sources


def kernels_in(cache: Path) -> list[str]:
    """Suffixes of what a cache holds besides its lock."""
    return sorted(p.suffix for p in (cache / "kernels").iterdir() if p.name != ".lock")


def compiler_script(folder: Path, body: str) -> Path:
    """A compiler that answers --version, then runs `body`."""
    script = folder / "cc"
    script.write_text(f'#!/bin/sh\n[ "$1" = --version ] && exit 0\n{body}\n')
    script.chmod(0o755)
    return script


def test_a_machine_without_a_compiler_gets_the_reference(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines: list[str] = []
    monkeypatch.setenv("CC", "no-such-compiler")
    cpu = torch.device("cpu")
    kernels = native_kernels(torch.float32, cpu, cache=tmp_path, progress=lines.append)
    assert kernels is None
    assert isinstance(low_rank_kernel(kernels), ReferenceLowRank)
    assert len(lines) == 1
    assert "C compiler" in lines[0]


def test_kernels_that_are_built_load_without_a_compiler(
    small_sources: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    library.load_library(tmp_path)
    monkeypatch.setenv("CC", "no-such-compiler")
    assert library.load_library(tmp_path).one() == 1
    (small_sources / "one.c").write_text("int one(void) { return 3; }\n")
    with pytest.raises(BuildFailed, match="no C compiler"):
        library.load_library(tmp_path)


def test_kernels_of_a_wheel_are_taken_first(
    small_sources: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    library.load_library(tmp_path)
    (built,) = (tmp_path / "kernels").glob("*.so")
    (small_sources / "prebuilt").mkdir()
    built.rename(small_sources / "prebuilt" / f"{chosen_set().name}.so")
    monkeypatch.setenv("CC", "no-such-compiler")
    assert library.load_library(tmp_path / "other").two() == 2


def spoil(content: bytes, damage: str) -> bytes:
    """Returns the bytes of a library after some damage on the disk."""
    middle = len(content) // 2
    match damage:
        case "a bit":
            return content[:middle] + bytes([content[middle] ^ 16]) + content[middle + 1 :]
        case "zeros":
            return bytes(512) + content[512:]
        case "cut":
            return content[:middle]
        case "empty":
            return b""
        case _:
            return content[: -seal.SEAL_BYTES]


@pytest.mark.parametrize("damage", ["a bit", "zeros", "cut", "empty", "no seal"])
def test_a_damaged_library_is_built_anew(
    damage: str, small_sources: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    library.load_library(tmp_path)
    (built,) = (tmp_path / "kernels").glob("*.so")
    whole = built.read_bytes()
    assert seal.is_intact(built)
    built.unlink()  # a library that is mapped is not written to
    built.write_bytes(spoil(whole, damage))
    lines: list[str] = []
    with monkeypatch.context() as without:
        without.setenv("CC", "no-such-compiler")
        with pytest.raises(BuildFailed, match="no C compiler"):
            library.load_library(tmp_path, progress=lines.append)
    assert library.load_library(tmp_path, progress=lines.append).one() == 1
    assert lines[0] == lines[1]
    assert f"{built} is damaged" in lines[0]
    told = [line.split()[0] for line in lines[2:]]
    assert told == ["building", "compiled", "compiled", "built"]
    assert seal.is_intact(built)


def test_the_library_is_built_once_and_its_progress_told(
    small_sources: Path, tmp_path: Path
) -> None:
    lines: list[str] = []
    for _ in range(2):
        assert library.load_library(tmp_path, progress=lines.append).two() == 2
    assert [line.split()[0] for line in lines] == ["building", "compiled", "compiled", "built"]
    assert kernels_in(tmp_path) == [".so"]


def test_a_build_that_fails_keeps_what_is_done_and_is_not_repeated(
    small_sources: Path, tmp_path: Path
) -> None:
    good = (small_sources / "two.c").read_text()
    (small_sources / "two.c").write_text("this is no C\n")
    with pytest.raises(BuildFailed, match=r"ended with 1: .*two\.c"):
        library.load_library(tmp_path)
    (objects,) = (path for path in (tmp_path / "kernels").iterdir() if path.is_dir())
    assert [path.name for path in objects.glob("*.o")] == ["one.c.o"]
    (note,) = (tmp_path / "kernels").glob("*.failed")
    with pytest.raises(BuildFailed, match=f"two.c.*remove {note} to try again"):
        library.load_library(tmp_path)
    note.unlink()
    (small_sources / "two.c").write_text(good)
    assert library.load_library(tmp_path).one() == 1


def test_a_build_goes_on_from_what_is_done(small_sources: Path, tmp_path: Path) -> None:
    target, objects = tmp_path / "k.so", tmp_path / "k"
    compiler = build.find_compiler()
    assert compiler is not None
    (small_sources / "two.c").write_text("this is no C\n")
    with pytest.raises(BuildFailed):
        build.build(compiler, chosen_set(), objects, target)
    (small_sources / "one.c").write_text("nor is this, but it is not compiled again\n")
    (small_sources / "two.c").write_text("int two(void) { return 2; }\n")
    build.build(compiler, chosen_set(), objects, target)
    assert target.exists()
    assert not objects.exists()


def test_a_compiler_that_fails_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CC", "false")
    with pytest.raises(BuildFailed, match="false ended with 1"):
        library.load_library(tmp_path)


def test_a_compiler_that_takes_too_long_is_ended_with_its_children(
    small_sources: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    children = tmp_path / "children"
    body = f"sleep 1000 & echo $! >> {children}\nwhile :; do :; done"
    monkeypatch.setenv("CC", str(compiler_script(tmp_path, body)))
    monkeypatch.setattr(build, "BUILD_CPU_SECONDS", 1)
    with pytest.raises(BuildFailed, match="ended with -"):
        library.load_library(tmp_path)
    started = children.read_text().split()
    assert len(started) == len(build.UNITS)
    for child in started:
        while alive(int(child)):  # a signal takes its time; the test's own limit ends this
            os.sched_yield()


def test_a_compiler_ends_with_the_process_that_started_it(tmp_path: Path) -> None:
    children = tmp_path / "children"
    script = (
        "from pathlib import Path\n"
        "from adaplex.model.kernels.native import build\n"
        f"command = ['sh', '-c', 'echo $$ >> {children}; exec sleep 1000']\n"
        f"build.run_bounded(command, Path('{tmp_path}') / 'stderr')\n"
    )
    with subprocess.Popen([sys.executable, "-c", script]) as process:
        while not (children.exists() and children.read_text().endswith("\n")):
            assert process.poll() is None
        process.kill()
    child = int(children.read_text())
    while alive(child):  # a signal takes its time; the test's own limit ends this
        os.sched_yield()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_process_that_is_stopped_ends_its_compilers_and_keeps_what_is_done(
    number: signal.Signals, small_sources: Path, tmp_path: Path
) -> None:
    """The compiler of the first unit is done at once, that of the second one waits."""
    children = tmp_path / "children"
    body = f'case "$*" in *two.c) echo $$ >> {children}; exec sleep 1000;; esac; exec gcc "$@"'
    script = (
        "import signal\n"
        "from pathlib import Path\n"
        "from adaplex.model.kernels.native import build, library\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored in background jobs\n"
        f"build.HERE = library.HERE = Path('{small_sources}')\n"
        "build.UNITS = ('one.c', 'two.c')\n"
        f"library.load_library(Path('{tmp_path}'), progress=lambda line: print(line, flush=True))\n"
    )
    environment = {**os.environ, "CC": str(compiler_script(tmp_path, body))}
    command = [sys.executable, "-c", script]
    with subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    ) as process:
        assert process.stdout is not None
        while process.stdout.readline() != "compiled one.c\n":
            assert process.poll() is None
        while not (children.exists() and children.read_text().endswith("\n")):
            assert process.poll() is None
        process.send_signal(number)
        assert process.wait() != 0
    while alive(int(children.read_text())):  # the test's own limit ends this
        os.sched_yield()
    (objects,) = (path for path in (tmp_path / "kernels").iterdir() if path.is_dir())
    assert [path.name for path in objects.glob("*.o")] == ["one.c.o"]
    assert not [*(tmp_path / "kernels").glob("*.failed")], "the next start goes on"


def test_a_start_does_not_wait_for_a_slow_compiler_and_the_next_one_has_its_result(
    small_sources: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate = tmp_path / "gate"
    os.mkfifo(gate)
    body = f'case "$*" in *two.c) read line < {gate};; esac; exec gcc "$@"'
    monkeypatch.setenv("CC", str(compiler_script(tmp_path, body)))
    cpu, lines = torch.device("cpu"), list[str]()
    kernels = native_kernels(
        torch.float32, cpu, cache=tmp_path, progress=lines.append, patience=0.0
    )
    assert kernels is None
    assert "torch" in lines[-1]
    assert "goes on, for the next start" in lines[-1]
    with gate.open("w") as opened:
        opened.write("go\n")
    told = list[str]()
    assert library.load_library(tmp_path, progress=told.append).two() == 2
    assert not told, "the next one waits for the lock, and builds nothing"


def alive(process: int) -> bool:
    """True until a process has ended; a zombie has ended."""
    try:
        state = Path(f"/proc/{process}/stat").read_text().rpartition(") ")[2][0]
    except FileNotFoundError:
        return False
    return state not in "ZX"


def test_a_variable_chooses_a_lower_set(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(VARIABLE, raising=False)
    assert chosen_set() == usable_sets()[0]
    for each in usable_sets():
        monkeypatch.setenv(VARIABLE, each.name)
        assert chosen_set() == each
    assert "portable" in {each.name for each in usable_sets()}


@pytest.mark.parametrize(
    ("vendor", "best"), [("AuthenticAMD", "avx512-bf16"), ("GenuineIntel", "avx512-vnni")]
)
def test_the_best_set_depends_on_the_vendor(
    vendor: str, best: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    every = frozenset[str]().union(*(each.needs for each in INSTRUCTION_SETS))
    monkeypatch.setattr(instruction_sets, "processor_features", lambda: every)
    monkeypatch.setattr(instruction_sets, "processor_vendor", lambda: vendor)
    names = [each.name for each in usable_sets()]
    assert names[0] == best
    assert names[-2:] == ["avx2", "portable"]
    assert len(names) == len(INSTRUCTION_SETS)


def test_a_set_that_the_processor_lacks_is_refused_with_those_it_has(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv(VARIABLE, "avx1024")
    with pytest.raises(UnknownInstructionSet, match=r"'avx1024'.*can run: .*portable"):
        chosen_set()


@pytest.mark.slow
@pytest.mark.parametrize("instructions", INSTRUCTION_SETS, ids=lambda each: each.name)
def test_every_set_compiles_without_a_warning(
    instructions: library.InstructionSet, tmp_path: Path
) -> None:
    compiler = build.find_compiler()
    assert compiler is not None
    for unit in build.UNITS:
        command = [*compiler, *build.FLAGS, "-Wall", "-Wextra", "-Werror", *instructions.flags]
        command.append("-fsyntax-only")
        build.run(
            [*command, "-c", "-o", str(tmp_path / "o"), str(build.HERE / unit)], tmp_path / unit
        )
