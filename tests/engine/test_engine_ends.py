from __future__ import annotations

import time

import pytest

from adaplex.engine.batch import Batch
from adaplex.engine.errors import DeadlineExpired, EngineFailed, LogitsOverflowed
from adaplex.engine.request import OVERFLOWED, SampledToken
from engine.fakes import Ledger, ManualExecutor, make_engine, make_request
from fake_runner import expected, next_token


@pytest.mark.parametrize("steps", range(8))
def test_abort_at_any_point_frees_everything(steps: int) -> None:
    engine, _ = make_engine()
    ledger = Ledger(engine)
    other = make_request("other", range(30), "b")
    engine.add(make_request("victim", range(30), "a"))
    engine.add(other)
    for _ in range(steps):
        ledger.step()
    engine.abort("victim")
    engine.abort("unknown")
    engine.check_integrity()
    seen = len(ledger.outputs.get("victim", []))
    ledger.drain()
    assert len(ledger.outputs.get("victim", [])) == seen
    assert ledger.tokens("other") == expected(other)


def test_abort_while_the_adapter_loads() -> None:
    executor = ManualExecutor()
    engine, _ = make_engine(executor)
    ledger = Ledger(engine)
    engine.add(make_request("r", adapter="a"))
    ledger.step()
    engine.abort("r")
    executor.run_all()
    ledger.step()
    assert engine.stats().resident == {"sha256:a"}
    ledger.check_idle()


@pytest.mark.parametrize("steps", [0, 3])
def test_a_deadline_ends_a_request_waiting_or_running(steps: int) -> None:
    engine, _ = make_engine()
    ledger = Ledger(engine)
    engine.add(make_request("r", range(30), deadline=time.monotonic() + (1e9 if steps else -1)))
    for _ in range(steps):
        ledger.step()
    if steps:
        assert engine.next_deadline is not None
        engine.abort("r")
        engine.add(make_request("r2", range(30), deadline=time.monotonic() + 0.02))
        ledger.step()
        time.sleep(0.03)
        ledger.step()
    name = "r2" if steps else "r"
    ledger.drain()
    assert isinstance(ledger.error(name), DeadlineExpired)
    assert ledger.last(name).timing is not None


def test_a_failed_step_fails_its_batch_and_the_engine_lives_on() -> None:
    engine, runner = make_engine(max_running=2)
    ledger = Ledger(engine)
    waiting = make_request("waiting", adapter="b")
    engine.add(make_request("a", adapter="a"))
    engine.add(make_request("base"))
    engine.add(waiting)
    ledger.step()
    runner.failure = RuntimeError("device")
    ledger.step()
    runner.failure = None
    for name in ("a", "base"):
        error = ledger.error(name)
        assert isinstance(error, EngineFailed)
        assert isinstance(error.__cause__, RuntimeError)
    ledger.drain()
    assert ledger.tokens("waiting") == expected(waiting)


def test_a_runner_that_returns_too_few_tokens_fails_the_batch() -> None:
    engine, runner = make_engine()
    runner.run = lambda batch: []  # type: ignore[method-assign]
    engine.add(make_request("r"))
    ledger = Ledger(engine)
    ledger.drain()
    assert isinstance(ledger.error("r"), EngineFailed)


def test_the_fake_runner_knows_one_token_from_another() -> None:
    assert next_token("a", [1, 2]) != next_token("b", [1, 2]) != next_token("a", [2, 1])


def test_a_row_that_overflows_fails_alone() -> None:
    engine, runner = make_engine()
    plain = runner.run

    def overflow(batch: Batch) -> list[SampledToken]:
        return [
            SampledToken(OVERFLOWED) if chunk.sequence.request_id == "bad" else token
            for chunk, token in zip(batch.sampling, plain(batch), strict=True)
        ]

    runner.run = overflow  # type: ignore[method-assign]
    good = make_request("good", max_tokens=3)
    ledger = Ledger(engine)
    for request in (make_request("bad", [7, 8]), good):
        engine.add(request)
    ledger.drain()
    assert isinstance(ledger.error("bad"), LogitsOverflowed)
    assert ledger.tokens("good") == expected(good)
    engine.check_integrity()
