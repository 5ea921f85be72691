from __future__ import annotations

from pathlib import Path

import grpc
import pytest

from adaplex.v1 import generation_pb2
from adaplex.v1.generation_pb2 import (
    ChatMessage,
    ChatPrompt,
    GenerateStreamRequest,
    GenerationSpec,
    SamplingParams,
    TokenIds,
)
from server.calls import spec, status
from server.fake_model import EOS, ScriptedRunner
from server.server_rig import rig


async def test_the_base_answers_when_no_adapter_is_named(tmp_path: Path) -> None:
    async with rig(tmp_path) as toy:
        answer = await toy.generate("grüße")
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
        answer = await toy.generate(adapter="a", mode=wanted)
    assert answer.started.adapter.mode == wanted


@pytest.mark.parametrize("name", ["nobody", "a@7", "sha256:" + "0" * 64, "toy", "../a"])
async def test_an_unknown_adapter_is_not_found_and_never_the_base(
    tmp_path: Path, name: str
) -> None:
    async with rig(tmp_path) as toy:
        await toy.upload("a")
        code, details = await status(toy.generate(adapter=name))
        assert toy.engine.stats().running == 0
    assert code is grpc.StatusCode.NOT_FOUND
    assert details["ErrorInfo"].reason == "ADAPTER_NOT_FOUND"
    assert details["ErrorInfo"].domain == "adaplex"


async def test_chat_goes_through_the_template(tmp_path: Path) -> None:
    chat = ChatPrompt(messages=[ChatMessage(role="user", content="hi")])
    async with rig(tmp_path) as toy:
        answer = await toy.generate(GenerationSpec(chat=chat))
    assert answer.text == "user:hi\n"


async def test_token_ids_are_taken_as_they_are(tmp_path: Path) -> None:
    ids = TokenIds(ids=b"abc")
    async with rig(tmp_path) as toy:
        answer = await toy.generate(GenerationSpec(token_ids=ids))
    assert answer.text == "abc"


async def test_logprobs_come_with_their_tokens(tmp_path: Path) -> None:
    async with rig(tmp_path) as toy:
        answer = await toy.generate("ab", sampling=SamplingParams(logprobs=2))
    assert [entry.token_id for entry in answer.logprobs] == [*b"ab", EOS]
    assert [len(entry.top) for entry in answer.logprobs] == [2, 2, 2]


async def test_an_answer_ends_before_its_stop_string(tmp_path: Path) -> None:
    async with rig(tmp_path) as toy:
        sampling = SamplingParams(stop=["lo wo", "never"])
        answer = await toy.generate("hello world", sampling=sampling)
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
        answer = await toy.generate("ababab", sampling=sampling)
    assert answer.text == text
    assert answer.finished.stop == "ab"
    assert answer.finished.completion_tokens == len(text) + 2


async def test_held_back_text_is_given_out_at_the_end(tmp_path: Path) -> None:
    async with rig(tmp_path) as toy:
        sampling = SamplingParams(stop=["lo world"])
        answer = await toy.generate("hello", sampling=sampling)
    assert answer.text == "hello"


async def test_max_tokens_cut_without_half_a_character(tmp_path: Path) -> None:
    async with rig(tmp_path) as toy:
        sampling = SamplingParams(max_tokens=2)
        answer = await toy.generate("aü", sampling=sampling)
    assert answer.text == "a"
    assert answer.finished.reason == generation_pb2.FINISH_REASON_LENGTH
    assert answer.finished.completion_tokens == 2


async def test_the_context_length_bounds_the_answer(tmp_path: Path) -> None:
    async with rig(tmp_path, runner=ScriptedRunner(lambda request: [65])) as toy:
        sampling = SamplingParams(max_tokens=100_000)
        answer = await toy.generate("x" * 250, sampling=sampling)
    assert answer.text == "A" * 6


async def test_ignore_eos_and_stop_tokens(tmp_path: Path) -> None:
    async with rig(tmp_path) as toy:
        sampling = SamplingParams(ignore_eos=True, max_tokens=5)
        answer = await toy.generate("ab", sampling=sampling)
        assert answer.text == "abab"
        sampling = SamplingParams(stop_token_ids=[ord("b")])
        answer = await toy.generate("ab", sampling=sampling)
    assert answer.text == "a"
    assert answer.finished.stop == str(ord("b"))
