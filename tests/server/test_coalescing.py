"""A late reader of a stream gets all outputs that wait as one message."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Callable
from contextlib import aclosing, asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from adaplex.engine.async_engine import AsyncEngine
from adaplex.engine.engine import Engine
from adaplex.engine.errors import EngineFailed
from adaplex.engine.request import AdapterMode, FinishReason, Logprob, Request, StepOutput
from adaplex.server.generator import Generator
from adaplex.server.rpc_context import RpcContext
from adaplex.v1 import generation_pb2
from adaplex.v1.generation_pb2 import (
    GenerateStreamRequest,
    GenerationSpec,
    SamplingParams,
)
from server.calls import until
from server.fake_model import ScriptedRunner
from server.server_rig import rig, toy_components


class Script:
    """Stands in for the engine: one step returns the next group, the outputs of several steps."""

    stalled = True
    next_deadline = None

    def __init__(self, groups: list[list[StepOutput]]) -> None:
        self.groups = groups
        self.aborted: list[str] = []
        self.on_load: Callable[[], None] = lambda: None
        self._request: Request | None = None

    def add(self, request: Request) -> None:
        self._request = request

    def abort(self, request_id: str) -> None:
        self.aborted.append(request_id)

    def step(self) -> list[StepOutput]:
        if self._request is None or not self.groups:
            return []
        return [replace(o, request_id=self._request.request_id) for o in self.groups.pop(0)]

    def close(self) -> None: ...


SECONDS = 0.25
"""Seconds between two steps of the script."""


def said(text: str, finish: FinishReason | None = None) -> list[StepOutput]:
    """Returns outputs of one byte per step."""
    outputs = [
        StepOutput("", tokens=(byte,), at=1 + n * SECONDS, logprobs=(Logprob(byte, -0.5),))
        for n, byte in enumerate(text.encode())
    ]
    outputs[0] = replace(outputs[0], admitted=True)
    outputs[-1] = replace(outputs[-1], finish=finish)
    return outputs


@asynccontextmanager
async def scripted(folder: Path, *groups: list[StepOutput]) -> AsyncIterator[Any]:
    """Yields a generator over a script, the script, and `value`, which reads a metric."""
    parts, _ = toy_components(folder, ScriptedRunner())
    script = Script(list(groups))
    engine = AsyncEngine(_as_engine(script))
    generator = Generator(
        engine=engine,
        registry=parts.registry,
        tokenizer=parts.tokenizer,
        limits=parts.limits,
        max_preparing=1,
        metrics=parts.metrics,
        model_name="toy",
        mode=AdapterMode.UNMERGED,
        fetch_missing=_nowhere,
    )

    def value(name: str) -> float:
        found = parts.prometheus.get_sample_value(f"adaplex_{name}", {"model_name": "toy"})
        assert found is not None
        return found

    await engine.start()
    try:
        yield generator, script, value
    finally:
        await engine.stop()
        generator.close()
        parts.registry.close()


def _as_engine(script: Any) -> Engine:
    engine: Engine = script
    return engine


async def _nowhere(_selector: str) -> bool:
    return False


def asked(generator: Generator, **sampling: Any) -> Any:
    spec = GenerationSpec(text="x", sampling=SamplingParams(max_tokens=20, **sampling))
    return generator.generate(spec, RpcContext("s", "m", "unary", "r", time.monotonic(), None))


async def events(generator: Generator, **sampling: Any) -> list[Any]:
    async with aclosing(asked(generator, **sampling)) as stream:
        return [event async for event in stream]


async def test_what_waits_is_one_message_and_every_token_counts(tmp_path: Path) -> None:
    async with scripted(tmp_path, said("hello", FinishReason.LENGTH)) as (generator, _, value):
        started, delta, finished = await events(generator)
    assert isinstance(started, generation_pb2.GenerationStarted)
    assert delta.text == "hello"
    assert bytes(delta.token_ids) == b"hello"
    assert [entry.token_id for entry in delta.logprobs] == [*b"hello"]
    assert finished.completion_tokens == 5
    assert value("generation_tokens_total") == 5
    assert value("inter_token_latency_seconds_count") == 4
    assert value("inter_token_latency_seconds_sum") == 4 * SECONDS


@pytest.mark.parametrize("interval", [1, 4, 100])
async def test_a_stream_is_told_in_messages_of_so_many_tokens(
    tmp_path: Path, interval: int
) -> None:
    runner = ScriptedRunner(lambda request: [*b"abcdefgh"], slow=0.01)
    spec = GenerationSpec(text="x", sampling=SamplingParams(max_tokens=40))
    async with rig(tmp_path, runner=runner, stream_interval=interval) as toy:
        runner.gate.clear()
        stream = toy.generation.GenerateStream(GenerateStreamRequest(spec=spec))
        _, *deltas, _ = [event async for event in stream]
        whole = await toy.generate(spec)
    counts = [len(event.delta.token_ids) for event in deltas]
    assert len(counts) > 1, "the first token does not wait"
    assert all(count >= interval for count in counts[1:-1])
    assert "".join(event.delta.text for event in deltas) == whole.text == "abcdefgh" * 5


async def test_a_stop_string_in_the_middle_ends_it_there(tmp_path: Path) -> None:
    async with scripted(tmp_path, said("hello world")) as (generator, script, value):
        _, delta, finished = await events(generator, stop=["lo"])
        await until(lambda: script.aborted == ["r#0"])
    assert delta.text == "hel"
    assert bytes(delta.token_ids) == b"hello"
    assert finished.stop == "lo"
    assert finished.completion_tokens == value("generation_tokens_total") == 5


async def test_a_stop_string_within_min_tokens_is_text(tmp_path: Path) -> None:
    async with scripted(tmp_path, said("ababab")) as (generator, _, _):
        _, delta, finished = await events(generator, stop=["ab"], min_tokens=2)
    assert delta.text == "ab"
    assert finished.completion_tokens == 4


async def test_what_has_ended_is_not_aborted(tmp_path: Path) -> None:
    async with scripted(tmp_path, said("end", FinishReason.LENGTH)) as (generator, script, _):
        _, delta, finished = await events(generator, stop=["nd"])
    assert script.aborted == []
    assert (delta.text, finished.stop) == ("e", "nd")


async def test_tokens_before_an_error_come_before_it(tmp_path: Path) -> None:
    group = [*said("he"), StepOutput("", error=EngineFailed("the step failed"))]
    async with scripted(tmp_path, group) as (generator, script, value):
        async with aclosing(asked(generator)) as stream:
            found = [await anext(stream), await anext(stream)]
            with pytest.raises(EngineFailed, match="the step failed"):
                await anext(stream)
        assert script.aborted == []
    assert [type(event).__name__ for event in found] == ["GenerationStarted", "GenerationDelta"]
    assert bytes(found[1].token_ids) == b"he"
    assert value("generation_tokens_total") == 2


async def test_an_error_alone_comes_alone(tmp_path: Path) -> None:
    group = [StepOutput("", error=EngineFailed("the step failed"))]
    async with scripted(tmp_path, group) as (generator, _, value):
        with pytest.raises(EngineFailed):
            await events(generator)
    assert value("generation_tokens_total") == 0


async def test_closing_aborts_while_outputs_wait(tmp_path: Path) -> None:
    async with scripted(tmp_path, said("he"), said("llo")) as (generator, script, value):
        async with aclosing(asked(generator)) as stream:
            await anext(stream)
        await until(lambda: script.aborted == ["r#0"])
    assert value("generation_tokens_total") == 0


async def test_a_loop_that_was_held_up_catches_up_with_one_message(tmp_path: Path) -> None:
    runner = ScriptedRunner(lambda request: [*b"abcdefgh"])
    sampling = SamplingParams(max_tokens=200, stop=["nowhere"], logprobs=1)
    request = GenerateStreamRequest(spec=GenerationSpec(text="x", sampling=sampling))
    async with rig(tmp_path, runner=runner) as toy:
        runner.gate.clear()
        stream = aiter(toy.generation.GenerateStream(request))
        first = await anext(stream)
        assert first.WhichOneof("event") == "started"
        runner.gate.set()
        while toy.engine.has_work:
            time.sleep(0.001)  # noqa: ASYNC251  # nobody reads until the engine is done
        *deltas, finished = [event async for event in stream]
    deltas = [event.delta for event in deltas]
    assert len(deltas) < 10, "the first tokens came alone, the others together"
    assert "".join(delta.text for delta in deltas) == "abcdefgh" * 25
    tokens = [token for delta in deltas for token in delta.token_ids]
    assert bytes(tokens) == b"abcdefgh" * 25
    assert [entry.token_id for delta in deltas for entry in delta.logprobs] == tokens
    assert finished.finished.completion_tokens == 200
