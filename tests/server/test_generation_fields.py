from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import grpc
import pytest

from adaplex.v1.generation_pb2 import (
    ChatMessage,
    ChatPrompt,
    GenerationSpec,
    SamplingParams,
    TokenIds,
)
from server.calls import status
from server.fake_model import VOCAB
from server.server_rig import rig


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
            "spec.chat.messages[0].role",
            {"chat": ChatPrompt(messages=[ChatMessage(role="", content="x")])},
        ),
        (
            "spec.chat.messages[0].role",
            {"chat": ChatPrompt(messages=[ChatMessage(role="x" * 65, content="x")])},
        ),
        (
            "spec.chat.messages[0].role",
            {"chat": ChatPrompt(messages=[ChatMessage(role="a\nb", content="x")])},
        ),
        ("spec.add_special_tokens", {"token_ids": TokenIds(ids=[1]), "add_special_tokens": True}),
        (
            "spec.add_special_tokens",
            {"chat": ChatPrompt(messages=[ChatMessage(role="user")]), "add_special_tokens": True},
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
        code, details = await status(toy.generate(GenerationSpec(**(given | fields))))
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
        code, details = await status(toy.generate(sampling=sampling))
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
        answer = await toy.generate(
            "x" * 255, sampling=sampling, priority=-100, cache_salt="s" * 256
        )
    assert answer.text == "x"
