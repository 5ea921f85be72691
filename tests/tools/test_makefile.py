"""The targets of the Makefile install what they need, by the commands that make prints."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
STAMPS = (".serves", ".installed")
"""Files in .venv that say what is installed, in the order in which it is."""


def installs(folder: Path, target: str) -> list[str]:
    """Returns the extras that `make target` would install in a folder, in order."""
    command = ["make", "--dry-run", "--no-print-directory", target]
    ran = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=True)
    words = ran.stdout.split()
    return [word.strip("'.") for word in words if word.startswith("'.[")]


@pytest.fixture
def fresh(tmp_path: Path) -> Path:
    for name in ("Makefile", "pyproject.toml", "constraints.txt"):
        shutil.copy(ROOT / name, tmp_path)
        os.utime(tmp_path / name, (1, 1))
    (tmp_path / ".venv").mkdir()
    return tmp_path


@pytest.mark.parametrize("target", ["demo", "model", "wheel"])
def test_what_serves_needs_no_tools_of_tests(fresh: Path, target: str) -> None:
    assert installs(fresh, target) == ["[server]"]


@pytest.mark.parametrize("target", ["test", "test-slow", "check", "bench", "docs", "mutants"])
def test_tests_and_checks_add_their_tools(fresh: Path, target: str) -> None:
    assert installs(fresh, target) == ["[server]", "[dev]"]


def test_targets_find_what_others_have_installed(fresh: Path) -> None:
    for number, stamp in enumerate(STAMPS):
        (fresh / ".venv" / stamp).touch()
        os.utime(fresh / ".venv" / stamp, (2 + number, 2 + number))
        assert installs(fresh, "demo") == []
        assert installs(fresh, "test") == ["[dev]"] * (len(STAMPS) - 1 - number)
    os.utime(fresh / "constraints.txt", (9, 9))
    assert installs(fresh, "demo") == ["[server]"]
    assert installs(fresh, "test") == ["[server]", "[dev]"]
