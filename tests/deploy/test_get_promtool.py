from __future__ import annotations

import os
import subprocess
from pathlib import Path

from deploy.conftest import DEPLOY
from time_limits import WAIT_SECONDS

SCRIPT = DEPLOY / "get_promtool.sh"
BASH = "/bin/bash"


def run(**environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [BASH, SCRIPT],
        env={"HOME": "/nonexistent", **environment},
        capture_output=True,
        text=True,
        check=False,
        timeout=WAIT_SECONDS,
    )


def make_promtool(folder: Path) -> Path:
    tool = folder / "promtool"
    folder.mkdir(parents=True)
    tool.write_text("#!/bin/sh\n")
    tool.chmod(0o755)
    return tool


def test_promtool_on_the_path_is_used(tmp_path: Path) -> None:
    tool = make_promtool(tmp_path / "bin")
    assert run(PATH=f"{tool.parent}:{os.environ['PATH']}").stdout == f"{tool}\n"


def test_an_unpacked_promtool_is_found_without_network(tmp_path: Path) -> None:
    tool = make_promtool(tmp_path / "tools" / "prometheus" / "usr" / "bin")
    done = run(PATH=str(tmp_path / "empty"), ADAPLEX_CACHE=str(tmp_path))
    assert (done.returncode, done.stdout) == (0, f"{tool}\n")


def test_without_apt_the_error_says_how_to_install_it(tmp_path: Path) -> None:
    done = run(PATH=str(tmp_path / "empty"), ADAPLEX_CACHE=str(tmp_path))
    assert done.returncode == 1
    assert "install Prometheus" in done.stderr
    assert list(tmp_path.iterdir()) == []
