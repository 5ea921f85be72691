"""A process is killed during uploads: every acknowledged adapter is stored."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from adapters.handmade import (
    make_registry,
    records,
    staged,
)

pytestmark = pytest.mark.slow

ROUNDS = 5
UPLOADER = Path(__file__).with_name("uploader.py")


def upload_until_killed(root: Path, run: int, delay: float) -> list[str]:
    """Kills an uploader `delay` seconds after it was ready. Returns the lines that it printed."""
    process = subprocess.Popen(
        [sys.executable, str(UPLOADER), str(root), str(run)],
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    killer = threading.Timer(delay, process.kill)
    killer.start()
    lines = process.stdout.readlines()
    killer.join()
    process.stdout.close()
    assert process.wait() == -signal.SIGKILL
    return [line.strip() for line in lines if line.endswith("\n")]


def may_be_deleted(name: str) -> bool:
    """True if the uploader deletes this name, perhaps without printing that."""
    return int(name.rpartition("-")[2]) % 3 == 2


def test_what_was_acknowledged_survives_a_kill(tmp_path: Path) -> None:
    dice = random.Random(11)
    kept: dict[str, str] = {}
    gone: set[str] = set()
    for run in range(ROUNDS):
        for line in upload_until_killed(tmp_path, run, dice.uniform(0.05, 0.3)):
            name, digest = line.split()
            if digest == "-":
                del kept[name]
                gone.add(name)
            else:
                kept[name] = digest
        registry = make_registry(tmp_path)
        registry.check_integrity()
        assert staged(tmp_path) == []
        found = {record.name: record.digest for record in records(registry)}
        assert not gone & found.keys()
        gone |= {name for name in kept if may_be_deleted(name) and name not in found}
        kept = {name: digest for name, digest in kept.items() if name not in gone}
        for name, digest in kept.items():
            with registry.resolve(name) as lease:
                assert lease.record.digest == digest
                assert registry.programs.program(digest).digest == digest
        assert len(found.keys() - kept.keys()) <= run + 1, "one a round is in, but not said"
        registry.close()
    assert len(kept) >= ROUNDS


def test_a_kill_at_any_write_leaves_all_or_nothing(tmp_path: Path) -> None:
    here = Path(__file__).parent
    library = tmp_path / "kill_at_write.so"
    source = here / "kill_at_write.c"
    build = ["gcc", "-shared", "-fPIC", "-O1", "-o", str(library), str(source), "-ldl"]
    subprocess.run(build, check=True)
    done = subprocess.run(
        [sys.executable, str(here / "killed_writer.py"), str(tmp_path)],
        capture_output=True,
        text=True,
        timeout=280,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "LD_PRELOAD": str(library)},
    )
    assert done.returncode == 0, done.stderr[-2000:]
    report = json.loads(done.stdout)
    assert [found["wrong"] for found in report.values()] == [[]] * len(report)
    writes = {name: found["writes"] for name, found in report.items()}
    assert writes["upload"] > 20, writes
    assert all(count >= 4 for count in writes.values()), writes
