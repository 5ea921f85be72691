"""torch's library is loaded on a thread, if it is a build for the CPU."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from adaplex.model.imports import library_thread

PROGRAM = """
import sys
from pathlib import Path
from adaplex.model.imports.library_thread import load_library_of_torch
load_library_of_torch().join()
assert "torch" not in sys.modules
words = Path("/proc/self/maps").read_text().split()
mapped = {Path(word) for word in words if word.endswith("/libtorch_cpu.so")}
import torch
print(mapped == {Path(torch.__file__).resolve().parent / "lib" / "libtorch_cpu.so"})
print(int(torch.ones(2).sum()))
"""


def test_importing_torch_finds_the_library_that_the_thread_loaded() -> None:
    ran = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True)
    assert ran.stdout.split() == ["True", "2"], ran.stderr


@pytest.mark.parametrize("cuda", [True, False])
def test_other_builds_load_their_libraries_themselves(
    cuda: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A build with CUDA; one with a library less."""
    folder = tmp_path / "torch" / "lib"
    folder.mkdir(parents=True)
    (tmp_path / "torch" / "__init__.py").touch()
    names = (
        [*library_thread.LIBRARIES, library_thread.CUDA_LIBRARY] if cuda else ["libtorch_cpu.so"]
    )
    for name in names:
        (folder / name).touch()
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    assert library_thread.load_library_of_torch() is None


def test_without_torch_nothing_is_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    assert library_thread.load_library_of_torch() is None
