"""The benchmark of the GPU runs, on a tiny model and whatever device there is."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

BENCH = Path(__file__).parents[1] / "bench" / "gpu.py"


def test_it_measures_steps_and_swaps() -> None:
    small = ["--tiny", "--json", "--quantization", "fp32", "--arena", "16", "--context", "40"]
    quick = ["--rows", "1", "3", "--layers", "1", "--repeats", "1", "--warm-up", "1"]
    done = subprocess.run(
        [sys.executable, str(BENCH), *small, *quick], capture_output=True, text=True, timeout=200
    )
    assert done.returncode == 0, done.stderr[-3000:]
    points = [json.loads(line) for line in done.stdout.splitlines()]
    assert [(p["what"], p["rows"]) for p in points] == [
        *((mix, rows) for rows in (1, 3) for mix in ("base", "identical", "distinct")),
        ("swap", 1),
    ]
    assert all(p["floor"] > 0 and p["time"] > 0 for p in points)
    floors = {(p["what"], p["rows"]): p["floor"] for p in points}
    assert floors["base", 3] < floors["identical", 3] < floors["distinct", 3]
