from __future__ import annotations

import asyncio
import math
from pathlib import Path
from typing import Any

import grpc
import pytest

from adaplex.v1 import generation_pb2
from adaplex.v1.generation_pb2 import (
    ChatMessage,
    ChatPrompt,
    GenerateRequest,
    GenerateStreamRequest,
    GenerationSpec,
    SamplingParams,
    TokenIds,
)
from server.calls import status, until
from server.toy import EOS, VOCAB, FakeRunner, rig


def spec(text: str = "hello", **fields: Any) -> GenerationSpec:
    return GenerationSpec(**({"text": text} | fields))


async def test_the_base_answers_when_no_adapter_is_named(tmp_path: Path) -> None:
    async with rig(tmp_path) as toy:
        answer = await toy.generation.Generate(GenerateRequest(spec=spec("grüße")))
    assert answer.text == "grüße"
    assert list(answer.token_ids) == [*"grüße".encode(), EOS]
    assert not answer.started.HasField("adapter")
    assert answer.started.model == "toy"
    assert answer.finished.reason == generation_pb2.FINISH_REASON_STOP
    assert answer.finished.stop == str(EOS)
    assert answer.finished.prompt_tokens == 7
    assert answer.finished.completion_tokens == 8
    assert 0 < answer.finished.first_token_seconds <= answer.finished.total_seconds


async def test_a_stream_starts_with_the_proof_and_ends_with_the_figures(tmp_path: Path) -> None:
    async with rig(tmp_path) as toy:
        stored = await toy.upload("german")
        request = GenerateStreamRequest(spec=spec(adapter="german"))
        events = [event async for event in toy.generation.GenerateStream(request)]
    kinds = [event.WhichOneof("event") for event in events]
    assert kinds == ["started", *["delta"] * (len(kinds) - 2), "finished"]
    proof = events[0].started.adapter
    assert (proof.name, proof.version) == ("german", 1)
    assert proof.digest == stored.adapter.digest
    assert proof.mode == generation_pb2.ADAPTER_MODE_UNMERGED
    assert proof.modules == stored.adapter.modules > 0
    assert "".join(event.delta.text for event in events) == proof.digest[7] + "hello"


@pytest.mark.parametrize("mode", ["MERGED", "UNMERGED"])
async def test_the_mode_is_the_requests_own(tmp_path: Path, mode: str) -> None:
    async with rig(tmp_path) as toy:
        await toy.upload("a")
        wanted = generation_pb2.AdapterMode.Value(f"ADAPTER_MODE_{mode}")
        answer = await toy.generation.Generate(GenerateRequest(spec=spec(adapter="a", mode=wanted)))
    assert answer.started.adapter.mode == wanted


@pytest.mark.parametrize("name", ["nobody", "a@7", "sha256:" + "0" * 64, "toy", "../a"])
async def test_an_unknown_adapter_is_not_found_and_never_the_base(
    tmp_path: Path, name: str
) -> None:
    async with rig(tmp_path) as toy:
        await toy.upload("a")
        code, details = await status(
            toy.generation.Generate(GenerateRequest(spec=spec(adapter=name)))
        )
        assert toy.engine.stats().running == 0
    assert code is grpc.StatusCode.NOT_FOUND
    assert details["ErrorInfo"].reason == "ADAPTER_NOT_FOUND"
    assert details["ErrorInfo"].domain == "adaplex"


async def test_chat_goes_through_the_template(tmp_path: Path) -> None:
    chat = ChatPrompt(messages=[ChatMessage(role="user", content="hi")])
    async with rig(tmp_path) as toy:
        answer = await toy.generation.Generate(GenerateRequest(spec=GenerationSpec(chat=chat)))
    assert answer.text == "user:hi\n"


async def test_token_ids_are_taken_as_they_are(tmp_path: Path) -> None:
    ids = TokenIds(ids=b"abc")
    async with rig(tmp_path) as toy:
        answer = await toy.generation.Generate(GenerateRequest(spec=GenerationSpec(token_ids=ids)))
    assert answer.text == "abc"


async def test_logprobs_come_with_their_tokens(tmp_path: Path) -> None:
    async with rig(tmp_path) as toy:
        answer = await toy.generation.Generate(
            GenerateRequest(spec=spec("ab", sampling=SamplingParams(logprobs=2)))
        )
    assert [entry.token_id for entry in answer.logprobs] == [*b"ab", EOS]
    assert [len(entry.top) for entry in answer.logprobs] == [2, 2, 2]


async def test_an_answer_ends_before_its_stop_string(tmp_path: Path) -> None:
    async with rig(tmp_path) as toy:
        sampling = SamplingParams(stop=["lo wo", "never"])
        answer = await toy.generation.Generate(
            GenerateRequest(spec=spec("hello world", sampling=sampling))
        )
    assert answer.text == "hel"
    assert answer.finished.reason == generation_pb2.FINISH_REASON_STOP
    assert answer.finished.stop == "lo wo"
    assert answer.finished.completion_tokens == len("hello wo")
    assert answer.finished.total_seconds >= answer.finished.first_token_seconds > 0


@pytest.mark.parametrize(("min_tokens", "text"), [(0, ""), (1, ""), (2, "ab"), (4, "abab")])
async def test_a_stop_string_within_min_tokens_is_text(
    tmp_path: Path, min_tokens: int, text: str
) -> None:
    async with rig(tmp_path) as toy:
        sampling = SamplingParams(stop=["ab"], min_tokens=min_tokens)
        answer = await toy.generation.Generate(
            GenerateRequest(spec=spec("ababab", sampling=sampling))
        )
    assert answer.text == text
    assert answer.finished.stop == "ab"
    assert answer.finished.completion_tokens == len(text) + 2


async def test_held_back_text_is_given_out_at_the_end(tmp_path: Path) -> None:
    async with rig(tmp_path) as toy:
        sampling = SamplingParams(stop=["lo world"])
        answer = await toy.generation.Generate(
            GenerateRequest(spec=spec("hello", sampling=sampling))
        )
    assert answer.text == "hello"


async def test_max_tokens_cut_without_half_a_character(tmp_path: Path) -> None:
    async with rig(tmp_path) as toy:
        sampling = SamplingParams(max_tokens=2)
        answer = await toy.generation.Generate(GenerateRequest(spec=spec("aü", sampling=sampling)))
    assert answer.text == "a"
    assert answer.finished.reason == generation_pb2.FINISH_REASON_LENGTH
    assert answer.finished.completion_tokens == 2


async def test_the_context_length_bounds_the_answer(tmp_path: Path) -> None:
    async with rig(tmp_path, runner=FakeRunner(lambda request: [65])) as toy:
        sampling = SamplingParams(max_tokens=100_000)
        answer = await toy.generation.Generate(
            GenerateRequest(spec=spec("x" * 250, sampling=sampling))
        )
    assert answer.text == "A" * 6


async def test_ignore_eos_and_stop_tokens(tmp_path: Path) -> None:
    async with rig(tmp_path) as toy:
        sampling = SamplingParams(ignore_eos=True, max_tokens=5)
        answer = await toy.generation.Generate(GenerateRequest(spec=spec("ab", sampling=sampling)))
        assert answer.text == "abab"
        sampling = SamplingParams(stop_token_ids=[ord("b")])
        answer = await toy.generation.Generate(GenerateRequest(spec=spec("ab", sampling=sampling)))
    assert answer.text == "a"
    assert answer.finished.stop == str(ord("b"))


@pytest.mark.parametrize(
    ("field", "fields"),
    [
        ("spec.prompt", {"text": None}),
        ("spec.text", {"text": ""}),
        ("spec.text", {"text": "x" * 256}),
        ("spec.token_ids.ids[1]", {"token_ids": TokenIds(ids=[1, VOCAB])}),
        ("spec.token_ids", {"token_ids": TokenIds()}),
        ("spec.chat.messages", {"chat": ChatPrompt()}),
        ("spec.chat.messages", {"chat": ChatPrompt(messages=[ChatMessage(role="user")] * 1025)}),
        ("spec.token_ids", {"token_ids": TokenIds(ids=[VOCAB] * 256)}),
        (
            "spec.chat.messages[0].role",
            {"chat": ChatPrompt(messages=[ChatMessage(role="robot", content="x")])},
        ),
        (
            "spec.chat.messages",
            {"chat": ChatPrompt(messages=[ChatMessage(role="assistant", content="x")])},
        ),
        ("spec.mode", {"mode": 9}),
        ("spec.cache_salt", {"cache_salt": "x" * 257}),
        ("spec.priority", {"priority": 101}),
        ("spec.priority", {"priority": -101}),
    ],
)
async def test_a_field_out_of_range_is_named(
    tmp_path: Path, field: str, fields: dict[str, Any]
) -> None:
    given = {} if {"token_ids", "chat"} & set(fields) else {"text": "hello"}
    async with rig(tmp_path) as toy:
        code, details = await status(
            toy.generation.Generate(GenerateRequest(spec=GenerationSpec(**(given | fields))))
        )
    assert code is grpc.StatusCode.INVALID_ARGUMENT
    assert [v.field for v in details["BadRequest"].field_violations] == [field]


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("temperature", -0.1),
        ("temperature", 10.5),
        ("temperature", math.nan),
        ("top_p", 0),
        ("top_p", 1.01),
        ("min_p", -0.01),
        ("min_p", 1.01),
        ("repetition_penalty", 0),
        ("repetition_penalty", 10.5),
        ("presence_penalty", 2.1),
        ("presence_penalty", -math.inf),
        ("frequency_penalty", -2.1),
        ("max_tokens", 0),
        ("min_tokens", 129),
        ("stop", ["x"] * 17),
        ("stop[1]", ["x", ""]),
        ("stop[0]", ["x" * 257]),
        ("stop_token_ids", [1] * 65),
        ("stop_token_ids[0]", [VOCAB]),
        ("logprobs", 21),
    ],
)
async def test_a_sampling_field_out_of_range_is_named(
    tmp_path: Path, field: str, value: Any
) -> None:
    sampling = SamplingParams(**{field.partition("[")[0]: value})
    async with rig(tmp_path) as toy:
        code, details = await status(
            toy.generation.Generate(GenerateRequest(spec=spec(sampling=sampling)))
        )
    assert code is grpc.StatusCode.INVALID_ARGUMENT
    assert [v.field for v in details["BadRequest"].field_violations] == [f"spec.sampling.{field}"]
    assert details["ErrorInfo"].reason == "REQUEST_INVALID"


async def test_values_at_their_limits_are_taken(tmp_path: Path) -> None:
    sampling = SamplingParams(
        temperature=10,
        top_k=2**32 - 1,
        top_p=1,
        min_p=0,
        repetition_penalty=10,
        presence_penalty=-2,
        frequency_penalty=2,
        seed=2**64 - 1,
        max_tokens=1,
        min_tokens=1,
        stop=["x" * 256] * 16,
        stop_token_ids=[VOCAB - 1] * 64,
        logprobs=20,
    )
    async with rig(tmp_path) as toy:
        answer = await toy.generation.Generate(
            GenerateRequest(
                spec=spec("x" * 255, sampling=sampling, priority=-100, cache_salt="s" * 256)
            )
        )
    assert answer.text == "x"


def endless() -> FakeRunner:
    return FakeRunner(lambda request: [65])


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
    runner = FakeRunner(failure=RuntimeError("secret path /srv/x"))
    async with rig(tmp_path, runner=runner) as toy:
        call = toy.generation.Generate(
            GenerateRequest(spec=spec()), metadata=(("x-request-id", "r-1"),)
        )
        code, details = await status(call)
        message = await call.details()
        assert code is grpc.StatusCode.INTERNAL
        assert message == "internal error; request id r-1"
        assert details["RequestInfo"].request_id == "r-1"
        runner.failure = None
        assert (await toy.generation.Generate(GenerateRequest(spec=spec()))).text == "hello"


@pytest.mark.parametrize("fails_at_once", [True, False])
async def test_a_failed_step_counts_as_an_error_of_its_requests(
    tmp_path: Path, fails_at_once: bool
) -> None:
    runner = FakeRunner(lambda request: [65])
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
        value = toy.parts.prometheus.get_sample_value
        of_model = {"model_name": "toy"}
        ended = value("adaplex_request_success_total", of_model | {"finished_reason": "error"})
        refused = value("adaplex_admission_rejections_total", of_model | {"reason": "error"})
    assert (refused, ended) == (0, 1)


async def test_the_request_id_is_echoed_or_made(tmp_path: Path) -> None:
    async with rig(tmp_path) as toy:
        call = toy.generation.Generate(
            GenerateRequest(spec=spec()), metadata=(("x-request-id", "abc/1"),)
        )
        answer = await call
        assert answer.started.request_id == "abc/1"
        assert dict(await call.initial_metadata())["x-request-id"] == "abc/1"
        assert dict(await call.trailing_metadata())["x-request-id"] == "abc/1"
        call = toy.generation.Generate(GenerateRequest(spec=spec()))
        answer = await call
        assert answer.started.request_id == dict(await call.initial_metadata())["x-request-id"]


async def test_a_request_id_unfit_for_logs_is_refused(tmp_path: Path) -> None:
    async with rig(tmp_path) as toy:
        call = toy.generation.Generate(
            GenerateRequest(spec=spec()), metadata=(("x-request-id", "a b"),)
        )
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
