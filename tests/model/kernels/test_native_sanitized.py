"""The C kernels under AddressSanitizer, UBSan and ThreadSanitizer, in a program of their own."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from adaplex.model.kernels.native import build
from time_limits import WAIT_SECONDS

pytestmark = pytest.mark.slow

DRIVER = Path(__file__).parent / "native_sanitized.c"
FLAGS = ("-O1", "-g", "-std=gnu11", "-pthread", "-Wno-psabi", "-fno-sanitize-recover=all")


@pytest.mark.parametrize(
    ("sanitizers", "processor"),
    [
        pytest.param("address,undefined", ("-march=native",), id="memory-native"),
        pytest.param("address,undefined", (), id="memory-portable"),
        pytest.param("thread", ("-march=native",), id="threads-native"),
    ],
)
def test_the_sanitizers_find_nothing(
    sanitizers: str, processor: tuple[str, ...], tmp_path: Path
) -> None:
    binary = tmp_path / "sanitized"
    units = [str(build.HERE / unit) for unit in build.UNITS]
    compiler = shutil.which("gcc")
    assert compiler is not None
    subprocess.run(
        [
            *(compiler, *FLAGS, f"-fsanitize={sanitizers}", *processor, f"-I{build.HERE}"),
            *("-o", str(binary), str(DRIVER), *units, "-lm"),
        ],
        check=True,
        timeout=WAIT_SECONDS,
    )
    done = subprocess.run([str(binary)], capture_output=True, text=True, timeout=WAIT_SECONDS)
    assert done.returncode == 0, done.stderr[:2000]
