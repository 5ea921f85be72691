from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NoReturn

import grpc
import pytest

from adaplex.engine.errors import RequestInvalid
from adaplex.server import adapter_messages, generation_messages
from adaplex.server.generation_messages import ModelLimits
from adaplex.server.prompt_encoder import LONG_BYTES, PromptEncoder
from adaplex.server.text import TOKEN_BYTES
from adaplex.v1.generation_pb2 import ChatMessage, ChatPrompt, GenerateRequest, GenerationSpec
from server.calls import status, until
from server.fake_model import EOS, MODEL, VOCAB, ByteTokenizer
from server.server_rig import rig

LIMITS = ModelLimits(VOCAB, 256, frozenset([EOS]))
MOST = 256 * TOKEN_BYTES


class Gated(ByteTokenizer):
    """Encodes a long text only once the gate opens. Copies share the gate."""

    def __init__(self) -> None:
        self.begun, self.gate = threading.Event(), threading.Event()
        self.texts = 0

    def __deepcopy__(self, memo: object) -> Gated:
        return self

    def __call__(self, text: str, **options: Any) -> SimpleNamespace:
        self.texts += text != "a"
        if len(text) > LONG_BYTES:
            self.begun.set()
            self.gate.wait(5)
        return super().__call__(text)


class Untouched:
    """Many values that must not be read."""

    def __len__(self) -> int:
        return 1_000_000

    def __iter__(self) -> Iterator[NoReturn]:
        raise AssertionError("read before they were counted")


def chat(*contents: str) -> GenerationSpec:
    return GenerationSpec(
        chat=ChatPrompt(messages=[ChatMessage(role="user", content=c) for c in contents])
    )


@pytest.mark.parametrize(
    ("field", "spec"),
    [
        ("spec.text", GenerationSpec(text="x" * (MOST + 1))),
        ("spec.text", GenerationSpec(text="é" * (MOST // 2 + 1))),
        ("spec.chat", chat("x" * MOST, "x")),
    ],
)
async def test_text_that_cannot_fit_is_refused_before_it_is_encoded(
    field: str, spec: GenerationSpec
) -> None:
    prompts = PromptEncoder(Gated(), LIMITS)
    with pytest.raises(RequestInvalid, match=str(MOST)) as caught:
        prompts.check(spec)
    assert caught.value.field == field
    prompts.check(GenerationSpec(text="x" * MOST))
    prompts.close()


async def test_a_request_with_such_text_never_reaches_the_tokenizer(tmp_path: Path) -> None:
    tokenizer = Gated()
    async with rig(tmp_path, tokenizer=tokenizer) as toy:
        spec = GenerationSpec(text="x" * (MOST + 1))
        code, details = await status(toy.generate(spec))
    assert code is grpc.StatusCode.INVALID_ARGUMENT
    assert details["BadRequest"].field_violations[0].field == "spec.text"
    assert tokenizer.texts == 0


async def test_a_long_prompt_does_not_hold_up_short_ones(tmp_path: Path) -> None:
    tokenizer = Gated()
    async with rig(tmp_path, tokenizer=tokenizer) as toy:
        spec = GenerationSpec(text="x" * (LONG_BYTES + 1))
        long = asyncio.ensure_future(status(toy.generate(spec)))
        await asyncio.to_thread(tokenizer.begun.wait, 5)
        short = toy.generate("hi")
        assert (await asyncio.wait_for(short, 4)).text == "hi"
        assert not long.done()
        tokenizer.gate.set()
        code, _ = await long
    assert code is grpc.StatusCode.INVALID_ARGUMENT


async def test_the_requests_before_the_engine_are_bounded(tmp_path: Path) -> None:
    tokenizer = Gated()
    sizes = {"max_running": 1, "max_waiting": 1}
    async with rig(tmp_path, tokenizer=tokenizer, engine=sizes) as toy:
        request = GenerateRequest(spec=GenerationSpec(text="x" * (LONG_BYTES + 1)))
        entering = [
            asyncio.ensure_future(status(toy.generation.Generate(request))) for _ in range(2)
        ]
        await until(lambda: toy.server._generator._preparing.occupied == 2)
        code, details = await status(toy.generation.Generate(request))
        assert code is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert details["ErrorInfo"].reason == "QUEUE_FULL"
        assert details["RetryInfo"].retry_delay.ToTimedelta().total_seconds() > 0
        tokenizer.gate.set()
        await asyncio.gather(*entering)
        answer = await toy.generate("hi")
        assert answer.text == "hi"
        refused = toy.components.prometheus.get_sample_value(
            "adaplex_admission_rejections_total", {"reason": "queue_full", "model_name": MODEL}
        )
    assert refused == 1


def test_many_token_ids_are_counted_before_they_are_looked_at() -> None:
    spec: Any = SimpleNamespace(token_ids=SimpleNamespace(ids=Untouched()))
    with pytest.raises(RequestInvalid) as caught:
        generation_messages.check_prompt_ids(spec, LIMITS)
    assert caught.value.field == "spec.token_ids"
    assert "255" in caught.value.reason


def test_many_messages_are_counted_before_they_are_looked_at() -> None:
    spec: Any = SimpleNamespace(chat=SimpleNamespace(messages=Untouched()))
    with pytest.raises(RequestInvalid) as caught:
        generation_messages.check_chat(spec)
    assert caught.value.field == "spec.chat.messages"
    assert "1024" in caught.value.reason


def test_many_files_are_counted_before_they_are_looked_at() -> None:
    upload: Any = SimpleNamespace(files=Untouched())
    with pytest.raises(RequestInvalid) as caught:
        adapter_messages.file_specs(upload)
    assert caught.value.field == "metadata.files"
    assert "16" in caught.value.reason
