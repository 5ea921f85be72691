"""Prompts beside decoding streams, on a machine whose steps take modelled times."""

from __future__ import annotations

import math
import random
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from adaplex.engine.batch import Chunk
from adaplex.engine.chunk_cost_model import MIN_CHUNK, RECENT, ChunkCostModel
from adaplex.engine.prefill_budget import ROW_COUNTS, SHORT_SECONDS, PrefillBudget
from adaplex.engine.sequence import Sequence
from engine.fakes import make_config, make_request
from engine.timed_engine import (
    BLOCK,
    CPU,
    GPU,
    MACHINES,
    OVERHEAD,
    QUICK,
    SLOW_CONTEXT,
    Machine,
    Run,
)


@pytest.mark.parametrize("machine", MACHINES, ids=["cpu", "slow context", "costly chunks", "gpu"])
@pytest.mark.parametrize("streams", [1, 8, 16])
def test_a_long_prompt_never_holds_streams_up_by_three_times(
    machine: Machine, streams: int
) -> None:
    run = Run(machine)
    run.start_streams(streams)
    for turn in range(3):
        run.add(f"long{turn}", 4000)
        steps = run.until(f"long{turn}")
        assert max(step.seconds / step.alone for step in steps) <= 3
        prompts = sum(step.seconds - step.alone for step in steps)
        share, rows = prompts / sum(step.seconds for step in steps), 4000 / len(steps)
        assert share >= 0.3 or rows >= 240, "the prompt starves"


def test_the_budget_is_used_to_what_was_asked_for() -> None:
    run = Run(GPU, max_stretch=1.5)
    run.start_streams(4)
    run.add("warm", 4000)
    run.until("warm")
    run.add("long", 4000)
    steps = run.until("long")
    assert max(step.seconds / step.alone for step in steps) <= 1.7
    assert max(sum(step.prompts.values()) for step in steps) > 256


def test_without_streams_a_prompt_takes_whole_steps() -> None:
    run = Run(CPU)
    run.add("long", 4000)
    steps = run.until("long")
    assert [sum(step.prompts.values()) for step in steps] == [512] * 7 + [416]


def test_outliers_do_not_collapse_the_pace() -> None:
    def rows(machine: Machine) -> float:
        run = Run(machine)
        run.start_streams(8)
        run.add("warm", 4000)
        run.until("warm")
        run.add("long", 4000)
        return 4000 / len(run.until("long"))

    quiet = rows(Machine())
    for seed in range(5):
        assert rows(Machine(noise=random.Random(seed))) > 0.5 * quiet


def test_noise_does_not_make_steps_long() -> None:
    for seed in range(5):
        run = Run(Machine(noise=random.Random(seed)))
        run.start_streams(8)
        run.runner.machine.noise = random.Random(seed + 100)
        run.add("long", 4000)
        steps = run.until("long")
        usual = sorted(step.seconds / step.alone for step in steps)[: int(0.9 * len(steps))]
        assert usual[-1] <= 3


def test_a_machine_that_slows_down_is_followed() -> None:
    run = Run(Machine())
    run.start_streams(8)
    run.add("warm", 4000)
    run.until("warm")
    run.runner.machine.row *= 3
    run.add("long", 4000)
    late = run.until("long")[2 * RECENT :]
    assert max(step.seconds / step.alone for step in late) <= 3


def test_a_short_prompt_does_not_wait_for_a_long_one() -> None:
    run = Run(CPU)
    run.start_streams(8)
    run.add("long", 4000)
    for _ in range(5):
        run.step()
    run.add("short", 64)
    steps = run.until("short")
    assert len(steps) < 16
    assert "long" not in run.first
    both = [step for step in steps if "short" in step.prompts]
    rest = [step for step in steps if "long" in step.prompts]
    assert both
    assert rest, "the long prompt goes on too"
    run.until("long")


@pytest.mark.parametrize("machine", MACHINES, ids=["cpu", "slow context", "costly chunks", "gpu"])
def test_a_burst_of_short_prompts_fills_the_batch_at_once(machine: Machine) -> None:
    run = Run(machine)
    run.start_streams(16)
    full = run.runner.steps[-1].seconds  # what so many rows take is known from now on
    for name in [*run.first][1:]:
        run.engine.abort(name)
    burst = [f"short{number}" for number in range(15)]
    for name in burst:
        run.add(name, 64, max_tokens=4000)
    steps = run.until(*burst)
    assert max(step.seconds for step in steps) <= max(3 * full, full + SHORT_SECONDS)
    bound = Run(machine, max_stretch=math.inf)
    bound.start_streams(1)
    for name in burst:
        bound.add(name, 64, max_tokens=4000)
    fastest = sum(step.seconds for step in bound.until(*burst))
    assert sum(step.seconds for step in steps) <= 2 * fastest


def test_prompts_under_way_share_and_the_most_urgent_goes_first() -> None:
    run = Run(CPU)
    run.start_streams(8)
    for name in ("a", "b", "c"):
        run.add(name, 1600)
    run.add("urgent", 1600, priority=1)
    begun = run.runner.now
    run.until("a", "b", "c", "urgent")
    urgent, *others = sorted(run.first[name] - begun for name in ("a", "b", "c", "urgent"))
    assert run.first["urgent"] - begun == urgent
    assert others[-1] - others[0] < urgent < 0.4 * others[0]


def test_a_crowd_of_prompts_is_not_all_begun_at_once() -> None:
    run = Run(CPU)
    run.start_streams(8)
    for number in range(20):
        run.add(f"p{number}", 800)
    for _ in range(60):
        run.step()
    begun = {name for step in run.runner.steps for name in step.prompts if name[0] == "p"}
    assert 2 <= len(begun - run.first.keys()) <= 6
    run.until(*(f"p{n}" for n in range(20)))


def test_what_is_remembered_is_bounded() -> None:
    run = Run(CPU, max_running=64, max_waiting=1000)
    for number in range(400):
        run.add(f"r{number}", 1 + number * 37 % 3000, max_tokens=1 + number * 7 % 40)
    while run.engine.has_work:
        run.step()
    policy = run.engine._prefill
    assert len(policy._decodes) <= ROW_COUNTS
    assert len(policy._costs._tokens) <= 6
    small = policy._costs._small
    kept = [*policy._decodes.values(), *policy._costs._tokens.values()]
    kept += [small._seconds, small._tokens]
    assert all(len(values) <= RECENT for values in kept)


@given(
    rows=st.integers(0, 600),
    seconds=st.one_of(st.floats(0, 1), st.just(float("inf"))),
    token=st.floats(0, 1e-2),
    context=st.floats(0, 1e-5),
    takes=st.lists(
        st.tuples(st.integers(0, 250), st.integers(1, 4000), st.integers(1, 6)), max_size=8
    ),
)
def test_a_budget_is_kept(
    rows: int,
    seconds: float,
    token: float,
    context: float,
    takes: list[tuple[int, int, int]],
) -> None:
    config = make_config(
        block_tokens=BLOCK, num_blocks=64, max_step_tokens=600, max_chunk_tokens=300
    )
    costs = ChunkCostModel(BLOCK)
    sequence = Sequence(make_request("r", range(9000)))
    for start in (0, 1000, 8000):
        costs.record([Chunk(sequence, start, 64)], 64 * (token + context * (start + 32)))
    budget = PrefillBudget(config, rows, seconds, costs)
    taken, spent, dearest = 0, 0.0, 0.0
    for block, wanted, shares in takes:
        was_open = budget.open
        count = budget.split(shares).spend(block * BLOCK, wanted)
        assert (count > 0) == was_open
        assert count <= min(wanted, 300)
        assert count in (wanted, 0) or count % MIN_CHUNK == 0 or taken + count == rows
        taken += count
        price = costs.seconds(block * BLOCK, count)
        spent, dearest = spent + price, max(dearest, price)
    assert taken <= rows
    assert spent <= seconds + dearest * 1.01


def test_chunks_whose_own_cost_is_all_are_not_made_smaller() -> None:
    for machine, steps in ((OVERHEAD, 600), (SLOW_CONTEXT, 1600)):
        run = Run(machine)
        run.start_streams(1)
        run.add("long", 4000)
        assert 0.5 * steps < len(run.until("long")) < steps


def test_what_was_found_of_small_chunks_in_a_bad_hour_is_found_anew() -> None:
    run = Run(replace(QUICK, chunk=12e-3))
    run.start_streams(1)
    run.add("bad", 400)
    run.until("bad")
    run.runner.machine.chunk = QUICK.chunk
    run.add("long", 4000)
    steps = run.until("long")
    late = steps[len(steps) // 4 :]
    assert max(step.seconds / step.alone for step in late) <= 3
    assert len(steps) < 2000, "the prompt starves"
