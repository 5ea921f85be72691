"""Short prompts beside decoding streams, on a machine whose steps take modelled times."""

from __future__ import annotations

import math

import pytest

from adaplex.engine.prefill_budget import SHORT_ROWS, SHORT_SECONDS
from engine.timed_engine import CPU, QUICK, Machine, Run, Step

AVX2 = Machine(step=9e-3, row=3.5e-3, chunk=2e-3, context=5e-8)
"""A step of one stream takes as long as a chunk of one or two tokens adds."""
BUSY = Machine(step=36e-3, row=12e-3, chunk=8e-3)
"""Rows take so long that a block takes longer than SHORT_SECONDS."""


def burst(run: Run, *, streams: int = 1) -> list[Step]:
    """The steps of seven short prompts that arrive beside streams."""
    run.start_streams(streams)
    names = [f"short{number}" for number in range(7)]
    for name in names:
        run.add(name, 37, max_tokens=4000)
    return run.until(*names)


@pytest.mark.parametrize("machine", [AVX2, BUSY, QUICK, CPU], ids=["avx2", "busy", "quick", "cpu"])
def test_short_prompts_do_not_trickle_beside_a_stream_that_is_alone(machine: Machine) -> None:
    """Nothing is known of steps with more rows, as after a start."""
    steps, fastest = burst(Run(machine)), burst(Run(machine, max_stretch=math.inf))
    seconds = sum(step.seconds for step in steps)
    assert seconds <= 1.6 * sum(step.seconds for step in fastest)
    bound = max(SHORT_SECONDS, SHORT_ROWS * machine.row + machine.chunk)
    assert max(step.seconds - step.alone for step in steps) <= 1.5 * bound


def test_short_prompts_beside_a_long_one_are_within_its_bound() -> None:
    run = Run(QUICK)
    run.start_streams(8)
    run.add("long", 4000)
    for _ in range(5):
        run.step()
    for number in range(3):
        run.add(f"short{number}", 37)
    steps = run.until("short0", "short1", "short2")
    assert "long" not in run.first
    assert max(step.seconds / step.alone for step in steps) <= 3
