from __future__ import annotations

import uuid
from typing import Any

import pytest

from adaplex.client import (
    AdapterMode,
    AppliedAdapter,
    ChatMessage,
    DeadlineExceeded,
    Delta,
    Finished,
    FinishReason,
    Generation,
    Internal,
    InvalidArgument,
    SamplingParams,
    Started,
    Timing,
    TokenLogprob,
    TopLogprob,
    Usage,
)
from adaplex.v1 import generation_pb2
from client.canned import DIGEST, WORDS, deltas, event, finished, started
from client.fake_server import FakeServer
from time_limits import WAIT_SECONDS


def test_generate_returns_the_whole_answer(call: Any) -> None:
    answer = call("generate", "hello", adapter="tone", logprobs=1, request_id="r-1")
    assert answer == Generation(
        text="The answer is 42.",
        token_ids=(0, 1, 2, 3, 4),
        logprobs=tuple(TokenLogprob(t, -0.25, (TopLogprob(t + 1, -1.5),)) for t in range(5)),
        adapter=AppliedAdapter("tone", 3, DIGEST, AdapterMode.UNMERGED, 14),
        finish_reason=FinishReason.STOP,
        stop="</s>",
        usage=Usage(prompt_tokens=7, completion_tokens=5, cached_tokens=4),
        timing=Timing(0.25, 0.125, 0.5, 2.0),
        request_id="r-1",
        model="tiny",
    )
    assert answer.tokens_per_second == 2.5


def test_the_base_model_answers_without_an_adapter(call: Any) -> None:
    answer = call("generate", "hello")
    assert answer.adapter is None
    assert answer.logprobs == ()


def test_stream_gives_started_deltas_finished_in_order(call: Any) -> None:
    events, answer = call.stream("hello", adapter="tone@2", request_id="r-2")
    assert [type(event) for event in events] == [Started, *[Delta] * len(WORDS), Finished]
    assert events[0].adapter.version == 2
    assert [event.text for event in events] == ["", *WORDS, ""]
    assert events[-1].finish_reason is FinishReason.STOP
    assert answer == call("generate", "hello", adapter="tone@2", request_id="r-2")


def test_fields_reach_the_server_as_given(call: Any, server: FakeServer) -> None:
    call(
        "generate",
        "hello",
        adapter="tone@2",
        mode="merged",
        cache_salt="tenant-a",
        priority=-3,
        add_special_tokens=False,
        sampling=SamplingParams(temperature=0.0, top_k=5, stop=["a", "b"], logprobs=0),
        top_k=7,
        stop_token_ids=[1, 2],
        ignore_eos=False,
        seed=2**64 - 1,
    )
    spec = server.requests[0].spec
    assert (spec.text, spec.adapter, spec.cache_salt, spec.priority) == (
        "hello",
        "tone@2",
        "tenant-a",
        -3,
    )
    assert spec.HasField("add_special_tokens")
    assert not spec.add_special_tokens
    assert spec.mode == generation_pb2.ADAPTER_MODE_MERGED
    sent = {field.name for field, _ in spec.sampling.ListFields()}
    assert sent == {
        "temperature",
        "top_k",
        "stop",
        "stop_token_ids",
        "ignore_eos",
        "seed",
        "logprobs",
    }
    assert spec.sampling.top_k == 7  # The keyword overrides the object.
    assert spec.sampling.temperature == 0.0
    assert list(spec.sampling.stop) == ["a", "b"]
    assert spec.sampling.seed == 2**64 - 1


def test_unset_fields_are_absent_in_the_message(call: Any, server: FakeServer) -> None:
    call("generate", "hello")
    spec = server.requests[0].spec
    assert spec.sampling.ListFields() == []
    assert spec.mode == generation_pb2.ADAPTER_MODE_UNSPECIFIED


def test_a_single_stop_string_is_not_split_into_characters(call: Any, server: FakeServer) -> None:
    call("generate", "hello", stop="END")
    assert list(server.requests[0].spec.sampling.stop) == ["END"]


@pytest.mark.parametrize(
    "messages",
    [
        [ChatMessage("system", "be brief"), ChatMessage("user", "hi")],
        [{"role": "system", "content": "be brief"}, {"role": "user", "content": "hi"}],
        [ChatMessage("system", "be brief"), {"role": "user", "content": "hi"}],
    ],
)
def test_chat_messages(call: Any, server: FakeServer, messages: Any) -> None:
    call("generate", messages)
    sent = server.requests[0].spec
    assert sent.WhichOneof("prompt") == "chat"
    assert [(m.role, m.content) for m in sent.chat.messages] == [
        ("system", "be brief"),
        ("user", "hi"),
    ]


@pytest.mark.parametrize("ids", [[1, 2, 3], (4,), [], range(3)])
def test_token_ids(call: Any, server: FakeServer, ids: Any) -> None:
    call("generate", ids)
    sent = server.requests[0].spec
    assert sent.WhichOneof("prompt") == "token_ids"
    assert list(sent.token_ids.ids) == list(ids)


@pytest.mark.parametrize(
    ("prompt", "options", "field"),
    [
        ([1, -1], {}, "spec.token_ids.ids"),
        ([1, "two"], {}, "spec.token_ids.ids[1]"),
        ([{"role": "user"}], {}, "spec.chat.messages[0]"),
        ([{"role": "user", "content": 3}], {}, "spec.chat.messages[0].content"),
        ([ChatMessage("user", "a"), "b"], {}, "spec.chat.messages[1]"),
        ("lone \udcff surrogate", {}, "spec.text"),
        ("hello", {"top_k": -1}, "spec.sampling.top_k"),
        ("hello", {"temperature": "hot"}, "spec.sampling.temperature"),
        ("hello", {"seed": 2**64}, "spec.sampling.seed"),
        ("hello", {"stop": [1]}, "spec.sampling.stop"),
        ("hello", {"priority": 2**40}, "spec.priority"),
        ("hello", {"mode": "sideways"}, "spec.mode"),
        ("hello", {"adapter": "caf\xe9"}, "spec.adapter"),
        ("hello", {"request_id": "a\nb"}, "x-request-id"),
    ],
)
def test_a_value_its_field_cannot_hold_is_named_and_not_sent(
    call: Any, server: FakeServer, prompt: Any, options: dict[str, Any], field: str
) -> None:
    with pytest.raises(InvalidArgument) as raised:
        call("generate", prompt, **options)
    assert [violation.field for violation in raised.value.violations] == [field]
    assert server.requests == []


@pytest.mark.parametrize("prompt", [b"bytes", {"role": "user", "content": "hi"}, 5])
def test_a_prompt_of_no_known_kind_is_a_type_error(call: Any, prompt: Any) -> None:
    with pytest.raises(TypeError, match="prompt"):
        call("generate", prompt)


def test_an_unknown_keyword_is_a_type_error(call: Any) -> None:
    with pytest.raises(TypeError, match="max_token"):
        call("generate", "hello", max_token=3)


def test_metadata_names_the_adapter_and_the_request(call: Any, server: FakeServer) -> None:
    call.stream("hello", adapter="tone")
    sent = server.metadata[0]
    assert sent["x-adapter-id"] == sent["multiplexed_model_id"] == "tone"
    assert uuid.UUID(sent["x-request-id"]).version == 4


def test_metadata_of_a_base_call_names_no_adapter(call: Any, server: FakeServer) -> None:
    answers = [call("generate", "hello") for _ in range(2)]
    assert not {"x-adapter-id", "multiplexed_model_id"} & set(server.metadata[0])
    assert answers[0].request_id != answers[1].request_id
    assert answers[0].request_id == server.metadata[0]["x-request-id"]


def test_a_deadline_ends_the_call(call: Any, server: FakeServer) -> None:
    server.hold = True
    call("health")  # connects before the timeout starts
    with pytest.raises(DeadlineExceeded) as raised:
        call.stream("hello", timeout=0.5, request_id="late")
    assert raised.value.request_id == "late"
    assert server.cancelled.wait(WAIT_SECONDS)


@pytest.mark.parametrize("order", ["delta first", "started twice", "after the end", "no end"])
def test_events_that_break_the_protocol_are_internal_errors(
    call: Any, server: FakeServer, order: str
) -> None:
    spec = generation_pb2.GenerationSpec()
    first = event(started=started(spec, "r"))
    middle = event(delta=deltas(spec)[0])
    last = event(finished=finished())
    server.events = {
        "delta first": [middle, last],
        "started twice": [first, first],
        "after the end": [first, last, middle],
        "no end": [first, middle],
    }[order]
    with pytest.raises(Internal):
        call.stream("hello")


def test_values_newer_than_this_client_do_not_break_an_answer(
    call: Any, server: FakeServer
) -> None:
    first = event(started=started(generation_pb2.GenerationSpec(adapter="tone"), "r"))
    first.started.adapter.mode = 77  # type: ignore[assignment]
    last = event(finished=finished())
    last.finished.reason = 77  # type: ignore[assignment]
    server.events = [first, event(), last]
    events, answer = call.stream("hello")
    assert len(events) == 2
    assert answer.adapter.mode is None
    assert answer.finish_reason is None
