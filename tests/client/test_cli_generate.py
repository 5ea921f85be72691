from __future__ import annotations

import json
import sys
from typing import Any

import pytest

from adaplex.client.cli import render
from adaplex.v1 import generation_pb2
from client.canned import DIGEST, event, finished, started
from client.fake_server import FakeServer


def test_generate_prints_the_answer_and_its_proof(run: Any) -> None:
    result = run("generate", "hello", "--adapter", "tone@2", "--mode", "merged")
    assert result.exit_code == 0
    assert result.stdout == "The answer is 42.\n"
    assert result.stderr == (
        "tone@2 sha256:abababababab merged 14 modules | 7 (4 cached) + 5 tokens"
        " | 2.5 tok/s | stop\n"
    )


def test_generate_from_the_base_names_the_base(run: Any) -> None:
    assert run("generate", "hello").stderr.startswith("base model tiny | ")


@pytest.mark.parametrize(
    ("alias", "shown"), [("default", " (via default)"), ("latest", ""), ("", "")]
)
def test_generate_names_the_alias_and_prints_warnings(
    run: Any, server: FakeServer, alias: str, shown: str
) -> None:
    spec = generation_pb2.GenerationSpec(adapter="voice@1")
    begin = started(spec, "r")
    begin.adapter.alias = alias
    begin.adapter.warnings.append("another base\x1b[2J\nerror: forged")
    server.events = [event(started=begin), event(finished=finished())]
    lines = run("generate", "hello", "-a", "voice").stderr.splitlines()
    assert lines[0].startswith(f"voice@1{shown} sha256:abababababab ")
    assert lines[1:] == ["warning: another base[2J error: forged"]


def test_generate_applies_the_chat_template_unless_raw(run: Any, server: FakeServer) -> None:
    run("generate", "hello")
    run("generate", "--raw", "hello")
    chat, raw = (request.spec for request in server.requests)
    assert [(m.role, m.content) for m in chat.chat.messages] == [("user", "hello")]
    assert raw.text == "hello"


def test_generate_sends_text_to_a_model_without_a_chat_template(
    run: Any, server: FakeServer
) -> None:
    server.has_template = False
    result = run("generate", "hello", "--adapter", "tone", "--max-tokens", 9)
    assert result.exit_code == 0
    assert result.stdout == "The answer is 42.\n"
    assert "no chat template: the prompt is sent as text" in result.stderr
    sent = server.requests[-1].spec
    assert (sent.text, sent.adapter, sent.sampling.max_tokens) == ("hello", "tone", 9)
    refused = run("generate", "--chat", "hello")
    assert refused.exit_code == 1
    assert "send text" in refused.stderr


@pytest.mark.parametrize(("option", "value"), [("special", True), ("no-special", False)])
def test_generate_chooses_special_tokens_and_prints_warnings(
    run: Any, server: FakeServer, option: str, value: bool
) -> None:
    result = run("generate", "--raw", "hello", f"--{option}-tokens")
    assert server.requests[0].spec.add_special_tokens is value
    assert f"warning: special tokens: {value}" in result.stderr


def test_generate_reads_standard_input(run: Any, server: FakeServer) -> None:
    assert run("generate", "--raw", text="two\nlines\n").exit_code == 0
    assert server.requests[0].spec.text == "two\nlines"


def test_generate_without_a_prompt_is_a_usage_error(run: Any, server: FakeServer) -> None:
    result = run("generate", text="")
    assert result.exit_code == 2
    assert "prompt" in result.stderr
    assert server.requests == []


def test_generate_passes_every_option(run: Any, server: FakeServer) -> None:
    options = "--max-tokens 9 --temperature 0.5 --top-k 4 --top-p 0.5 --min-p 0.25 --seed 0"
    run("generate", "hello", *options.split(), "--stop", "a", "--stop", "b", "--logprobs", 1)
    sampling = server.requests[0].spec.sampling
    expected = generation_pb2.SamplingParams(
        max_tokens=9,
        temperature=0.5,
        top_k=4,
        top_p=0.5,
        min_p=0.25,
        seed=0,
        stop=["a", "b"],
        logprobs=1,
    )
    assert sampling == expected


def test_generate_shows_log_probabilities(run: Any) -> None:
    result = run("generate", "hello", "--logprobs", 1)
    assert "LOGPROB" in result.stdout
    assert "-0.2500" in result.stdout


def test_generate_as_json_is_the_whole_result(run: Any) -> None:
    result = run("generate", "hello", "--adapter", "tone", "--json")
    answer = json.loads(result.stdout)
    assert answer["text"] == "The answer is 42."
    assert answer["adapter"] == {
        "name": "tone",
        "version": 3,
        "digest": DIGEST,
        "mode": "unmerged",
        "modules": 14,
        "alias": "",
        "components": [],
        "warnings": [],
    }
    assert answer["finish_reason"] == "stop"
    assert answer["usage"]["cached_tokens"] == 4


def test_generate_ends_the_line_after_an_error(run: Any, server: FakeServer) -> None:
    spec = generation_pb2.GenerationSpec()
    delta = generation_pb2.GenerationDelta(text="half an ans")
    server.events = [event(started=started(spec, "r")), event(delta=delta)]
    result = run("generate", "hello")
    assert result.exit_code == 1
    assert result.stdout == "half an ans\n"
    assert result.stderr == "error: the stream ended without its last event\n"


def test_text_with_control_characters_is_shown_without_them_on_a_terminal(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    render.text("a\x1b[31mb\n\tc\x9b")
    assert capsys.readouterr().out == "a[31mb\n\tc"
