"""The wheel has the C kernels of every instruction set, and needs no compiler."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from adaplex.model.kernels.native.instruction_sets import VARIABLE
from instruction_sets import EMULATED, USABLE
from time_limits import WAIT_SECONDS

ROOT = Path(__file__).parents[2]
SOURCES = (
    *("pyproject.toml", "README.md", "LICENSE", "protos", "clients", "deploy/wheel"),
    *("adapters/adaplex", "server/adaplex"),
)
"""Files and folders that the build of a wheel reads."""
USE = """
import torch
from pathlib import Path
from adaplex.model.kernels.native.kernels import NativeKernels
from adaplex.model.linear.native import NativeLinear
kernels = NativeKernels(torch.bfloat16, Path({cache!r}))
weight = torch.eye(64, dtype=torch.bfloat16)
assert torch.equal(NativeLinear.dense(kernels, weight, None)(weight), weight)
print(kernels.instructions.name)
"""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wheel of a copy of the sources, built as `make wheel` does, but for less optimization."""
    copy = tmp_path_factory.mktemp("sources")
    for name in SOURCES:
        place = copy / name
        place.parent.mkdir(parents=True, exist_ok=True)
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, place, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(ROOT / name, place)
    flags = copy / "server/adaplex/model/kernels/native/build.py"
    assert '"-O3"' in flags.read_text()
    flags.write_text(flags.read_text().replace('"-O3"', '"-O1"'))
    env = {**os.environ, "ADAPLEX_WHEEL_PLATFORM": "linux_test", "PYTHONPATH": ""}
    command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel"]
    subprocess.run(command, cwd=copy, env=env, check=True, timeout=WAIT_SECONDS)
    (built,) = (copy / "dist").glob("*.whl")
    return built


@pytest.mark.slow
def test_a_wheel_serves_every_usable_set_without_a_compiler(wheel: Path, tmp_path: Path) -> None:
    assert wheel.name.endswith("-py3-none-linux_test.whl")
    installed, cache = tmp_path / "installed", tmp_path / "cache"
    with zipfile.ZipFile(wheel) as file:
        file.extractall(installed)
    for each in USABLE:
        if each == EMULATED:
            continue
        env = {
            **os.environ,
            "CC": "no-such-compiler",
            "PYTHONPATH": str(installed),
            VARIABLE: each.name,
        }
        command = [sys.executable, "-c", USE.format(cache=str(cache))]
        done = subprocess.run(
            command, env=env, capture_output=True, text=True, timeout=WAIT_SECONDS
        )
        assert done.stdout.split() == [each.name], done.stderr
    assert not cache.exists()
