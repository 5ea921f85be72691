from __future__ import annotations

import asyncio
from pathlib import Path

import grpc
import pytest

from adaplex.v1.generation_pb2 import GenerateRequest, GenerateStreamRequest, SamplingParams
from server.calls import spec, status, until
from server.fake_model import ScriptedRunner
from server.server_rig import rig


def endless() -> ScriptedRunner:
    return ScriptedRunner(lambda request: [65])


LONG = SamplingParams(max_tokens=200)


async def test_a_deadline_ends_the_work(tmp_path: Path) -> None:
    runner = endless()
    async with rig(tmp_path, runner=runner) as toy:
        await toy.upload("a")
        runner.gate.clear()
        request = GenerateRequest(spec=spec(sampling=LONG, adapter="a"))
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await toy.generation.Generate(request, timeout=0.2)
        assert caught.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
        runner.gate.set()
        await until(lambda: not toy.engine.has_work)


async def test_a_cancel_ends_the_work(tmp_path: Path) -> None:
    runner = endless()
    async with rig(tmp_path, runner=runner, engine={"max_model_len": 1000}) as toy:
        stored = await toy.upload("a")
        call = toy.generation.GenerateStream(
            GenerateStreamRequest(spec=spec(sampling=LONG, adapter="a"))
        )
        first = await call.read()
        assert first.WhichOneof("event") == "started"
        call.cancel()
        await until(lambda: not toy.engine.has_work)
        assert stored.adapter.digest in toy.engine.stats().resident


async def test_a_full_queue_says_when_to_try_again(tmp_path: Path) -> None:
    runner = endless()
    runner.gate.clear()
    async with rig(tmp_path, runner=runner, engine={"max_running": 1, "max_waiting": 1}) as toy:
        request = GenerateRequest(spec=spec(sampling=LONG))
        calls = [asyncio.ensure_future(toy.generation.Generate(request)) for _ in range(3)]
        done, waiting = await asyncio.wait(calls, timeout=5, return_when=asyncio.FIRST_COMPLETED)
        runner.gate.set()
        code, details = await status(done.pop())
        assert code is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert details["ErrorInfo"].reason == "QUEUE_FULL"
        assert details["RetryInfo"].retry_delay.ToTimedelta().total_seconds() > 0
        for call in waiting:
            assert (await call).text


async def test_a_failed_step_tells_nothing_of_the_inside(tmp_path: Path) -> None:
    runner = ScriptedRunner(failure=RuntimeError("secret path /srv/x"))
    async with rig(tmp_path, runner=runner) as toy:
        call = toy.generate(metadata=(("x-request-id", "r-1"),))
        code, details = await status(call)
        message = await call.details()
        assert code is grpc.StatusCode.INTERNAL
        assert message == "internal error; request id r-1"
        assert details["RequestInfo"].request_id == "r-1"
        runner.failure = None
        assert (await toy.generate()).text == "hello"


@pytest.mark.parametrize("fails_at_once", [True, False])
async def test_a_failed_step_counts_as_an_error_of_its_requests(
    tmp_path: Path, fails_at_once: bool
) -> None:
    runner = ScriptedRunner(lambda request: [65])
    async with rig(tmp_path, runner=runner) as toy:
        failure = RuntimeError("bug")
        runner.failure = failure if fails_at_once else None
        runner.gate.clear()
        request = GenerateStreamRequest(spec=spec(sampling=LONG))
        events = aiter(toy.generation.GenerateStream(request))
        if not fails_at_once:
            assert (await anext(events)).WhichOneof("event") == "started"
            runner.failure = failure
        with pytest.raises(grpc.aio.AioRpcError):
            [event async for event in events]
        value = toy.components.prometheus.get_sample_value
        of_model = {"model_name": "toy"}
        ended = value("adaplex_request_success_total", of_model | {"finished_reason": "error"})
        refused = value("adaplex_admission_rejections_total", of_model | {"reason": "error"})
    assert (refused, ended) == (0, 1)


async def test_the_request_id_is_echoed_or_made(tmp_path: Path) -> None:
    async with rig(tmp_path) as toy:
        call = toy.generate(metadata=(("x-request-id", "abc/1"),))
        answer = await call
        assert answer.started.request_id == "abc/1"
        assert dict(await call.initial_metadata())["x-request-id"] == "abc/1"
        assert dict(await call.trailing_metadata())["x-request-id"] == "abc/1"
        call = toy.generate()
        answer = await call
        assert answer.started.request_id == dict(await call.initial_metadata())["x-request-id"]


async def test_a_request_id_unfit_for_logs_is_refused(tmp_path: Path) -> None:
    async with rig(tmp_path) as toy:
        call = toy.generate(metadata=(("x-request-id", "a b"),))
        code, details = await status(call)
    assert code is grpc.StatusCode.INVALID_ARGUMENT
    assert details["BadRequest"].field_violations[0].field == "x-request-id"


async def test_two_requests_may_share_a_client_id(tmp_path: Path) -> None:
    async with rig(tmp_path) as toy:
        ids = (("x-request-id", "same"),)
        request = GenerateRequest(spec=spec())
        answers = await asyncio.gather(
            *(toy.generation.Generate(request, metadata=ids) for _ in range(3))
        )
    assert [answer.text for answer in answers] == ["hello"] * 3
