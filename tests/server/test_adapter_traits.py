"""Adapters that constrain requests: leading positions, invocation, merged only; over the wire."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import grpc
import pytest
import torch
from safetensors.torch import save

from adaplex.adapters import formats
from adaplex.adapters.program.base_spec import BaseModule
from adaplex.adapters.program.program import AdapterProgram, ModuleProgram
from adaplex.engine.sequence import VIRTUAL
from adaplex.v1 import adapters_pb2 as pb
from adaplex.v1.generation_pb2 import (
    ADAPTER_MODE_AUTO,
    ADAPTER_MODE_MERGED,
    ADAPTER_MODE_UNMERGED,
    GenerationSpec,
    WeightedAdapter,
)
from server import server_rig
from server.adapter_uploads import adapter_files
from server.calls import status
from server.fake_model import BASE, FEATURES, VOCAB, ScriptedRunner
from server.server_rig import rig

EMBEDDING = BaseModule("model.embed_tokens", "embedding", VOCAB, FEATURES)
ATTENTION = BaseModule("model.layers.0.self_attn", "block", FEATURES, FEATURES)
TOKENS = 20
BLOCKS = {"block_tokens": 16, "num_blocks": 129}


@pytest.fixture
def tunable(monkeypatch: pytest.MonkeyPatch) -> None:
    """Gives the toy's base an embedding and an attention block."""
    attention = replace(ATTENTION, layer=0, part="attention")
    modules = BASE.modules | {m.name: m for m in (EMBEDDING, attention)}
    changed = replace(BASE, modules=modules, kv_shapes=((2, 4, 4),))
    monkeypatch.setattr(server_rig, "BASE", changed)


class Recorder(ScriptedRunner):
    """Records the tokens of every sequence, and the position where its first chunk began."""

    def __init__(self) -> None:
        super().__init__()
        self.started: list[tuple[list[int], int]] = []
        self._known: set[Any] = set()

    def run(self, batch: Any) -> Any:
        for chunk in batch.chunks:
            if chunk.sequence not in self._known:
                self._known.add(chunk.sequence)
                self.started.append((list(chunk.sequence.tokens), chunk.start))
        return super().run(batch)


def learned(kind: str, width: int, tokens: int = TOKENS) -> dict[str, bytes]:
    """Returns the files of a prompt-learning checkpoint, as PEFT writes them."""
    config = {"peft_type": kind, "task_type": "CAUSAL_LM", "num_virtual_tokens": tokens}
    return {
        "adapter_config.json": json.dumps(config).encode(),
        "adapter_model.safetensors": save({"prompt_embeddings": torch.ones(tokens, width)}),
    }


PREFIX = ("PREFIX_TUNING", 2 * FEATURES)
PROMPT = ("PROMPT_TUNING", FEATURES)


@pytest.mark.usefixtures("tunable")
@pytest.mark.parametrize(("kind", "width"), [PREFIX, PROMPT])
async def test_positions_before_the_prompt_are_no_usage(
    kind: str, width: int, tmp_path: Path
) -> None:
    runner = Recorder()
    async with rig(tmp_path, runner=runner, engine=BLOCKS) as toy:
        done = await toy.upload_files(learned(kind, width), "tuned")
        first, second = [await toy.generate(adapter="tuned") for _ in range(2)]
        other = await toy.generate(adapter="tuned", cache_salt="other")
    assert done.adapter.leading_tokens == TOKENS
    sizes = (done.report.prefix_tokens, done.report.virtual_tokens)
    assert sizes == ((TOKENS, 0) if kind == "PREFIX_TUNING" else (0, TOKENS))
    expected = {"PREFIX_TUNING": ["KV prefix"], "PROMPT_TUNING": ["virtual tokens"]}[kind]
    assert [list(m.primitives) for m in done.report.modules] == [expected]
    for each in (first, second, other):
        assert (each.started.prompt_tokens, each.finished.prompt_tokens) == (5, 5)
        assert each.finished.cached_tokens == 0
        assert each.text.endswith("hello")
    tokens = [*range(VIRTUAL, VIRTUAL + TOKENS), *b"hello"]
    assert runner.started == [(tokens, 0), (tokens, 16), (tokens, 0)]


@pytest.mark.usefixtures("tunable")
async def test_positions_before_the_prompt_take_of_the_context(tmp_path: Path) -> None:
    async with rig(tmp_path, engine={"max_model_len": 30}) as toy:
        await toy.upload_files(learned(*PROMPT), "tuned")
        fits = await toy.generate("x" * 6, adapter="tuned")
        assert fits.finished.completion_tokens == 4
        code, details = await status(toy.generate("x" * 10, adapter="tuned"))
        assert code is grpc.StatusCode.INVALID_ARGUMENT
        [violation] = details["BadRequest"].field_violations
        assert violation.field == "prompt"
        assert "10 tokens behind the 20 of adapter tuned" in violation.description
        longer = await toy.generate("x" * 10)
        assert longer.finished.completion_tokens > 1


@pytest.mark.usefixtures("tunable")
async def test_a_prefix_and_virtual_tokens_lead_together(tmp_path: Path) -> None:
    runner = Recorder()
    async with rig(tmp_path, runner=runner) as toy:
        await toy.upload_files(learned(*PREFIX, tokens=4), "prefix")
        await toy.upload_files(learned(*PROMPT, tokens=3), "tokens")
        both = [WeightedAdapter(adapter="prefix"), WeightedAdapter(adapter="tokens")]
        answered = await toy.generate(adapters=both)
    assert answered.finished.prompt_tokens == 5
    assert runner.started == [([*range(VIRTUAL, VIRTUAL + 7), *b"hello"], 0)]


@pytest.mark.usefixtures("tunable")
async def test_two_of_a_combination_cannot_both_lead(tmp_path: Path) -> None:
    runner = Recorder()
    async with rig(tmp_path, runner=runner) as toy:
        await toy.upload_files(learned(*PROMPT), "tuned")
        await toy.upload_files(learned(*PROMPT, tokens=3), "also")
        both = [WeightedAdapter(adapter="tuned"), WeightedAdapter(adapter="also")]
        code, details = await status(toy.generate("x", adapters=both))
    assert code is grpc.StatusCode.INVALID_ARGUMENT
    [violation] = details["BadRequest"].field_violations
    assert violation.field == "adapters"
    assert "all put tokens before the prompt" in violation.description
    assert not runner.started


Lower = Callable[..., AdapterProgram]


def lowered_by(monkeypatch: pytest.MonkeyPatch, change: Callable[[AdapterProgram], Any]) -> None:
    """Makes lowering return the result of `change` for every checkpoint."""
    lower: Lower = formats.lower
    monkeypatch.setattr(formats, "lower", lambda *args: change(lower(*args)))


async def test_an_invoked_adapter_needs_its_invocation(tmp_path: Path) -> None:
    """The KV blocks before the invocation are shared with the base."""
    runner = Recorder()
    async with rig(tmp_path, runner=runner, engine=BLOCKS) as toy:
        files = adapter_files(alora_invocation_tokens=list(b"!!"))
        done = await toy.upload_files(files, "invoked")
        assert bytes(done.adapter.invocation_tokens) == b"!!"
        assert bytes(done.report.invocation_tokens) == b"!!"
        code, details = await status(toy.generate("! hello !", adapter="invoked"))
        assert code is grpc.StatusCode.INVALID_ARGUMENT
        [violation] = details["BadRequest"].field_violations
        assert violation.field == "prompt"
        assert "33, 33, which adapter invoked begins at" in violation.description
        assert not runner.started
        question = "a question of more than two blocks of tokens"
        base = await toy.generate(question)
        invoked = await toy.generate(f"{question}!!", adapter="invoked")
    assert base.finished.cached_tokens == 0
    assert invoked.finished.cached_tokens == 32
    assert invoked.text[0] == done.adapter.digest[7], "the adapter answers"


def only_merged(made: AdapterProgram) -> AdapterProgram:
    first, *others = made.modules
    transformed = ModuleProgram(first.module, transform=lambda weight: weight)
    return replace(made, modules=(transformed, *others))


@pytest.mark.parametrize("mode", [0, ADAPTER_MODE_AUTO, ADAPTER_MODE_MERGED])
async def test_what_can_only_be_merged_is(
    mode: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lowered_by(monkeypatch, only_merged)
    async with rig(tmp_path) as toy:
        done = await toy.upload_files(adapter_files(), "only")
        assert done.adapter.merged_only
        assert done.report.merged_only
        assert not done.report.warnings
        answered = await toy.generate(adapter="only", mode=mode)
        assert answered.started.adapter.mode == ADAPTER_MODE_MERGED
        assert not toy.engine.stats().resident


async def test_what_can_only_be_merged_is_refused_otherwise_and_no_pin(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lowered_by(monkeypatch, only_merged)
    async with rig(tmp_path) as toy:
        await toy.upload_files(adapter_files(), "only")
        unmerged = GenerationSpec(text="x", adapter="only", mode=ADAPTER_MODE_UNMERGED)
        calls = [
            toy.generate(unmerged),
            toy.adapters.UpdateAdapter(pb.UpdateAdapterRequest(name="only", pinned=True)),
        ]
        for call, field in zip(calls, ("spec.mode", "pinned"), strict=True):
            code, details = await status(call)
            assert code is grpc.StatusCode.INVALID_ARGUMENT
            [violation] = details["BadRequest"].field_violations
            assert violation.field == field
            assert "can only be served merged" in violation.description
        found = await toy.adapters.GetAdapter(pb.GetAdapterRequest(name="only"))
        assert not found.adapter.pinned


async def test_a_server_without_merged_weights_says_so_at_once_and_at_the_request(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lowered_by(monkeypatch, only_merged)
    async with rig(tmp_path, engine={"merged_bytes": 0}, merged_bytes=0) as toy:
        done = await toy.upload_files(adapter_files(), "only")
        [warning] = done.report.warnings
        assert "this server keeps no merged weights" in warning
        code, details = await status(toy.generate("x", adapter="only"))
        assert code is grpc.StatusCode.INVALID_ARGUMENT
        [violation] = details["BadRequest"].field_violations
        assert violation.field == "mode"
        assert "keeps no merged weights; adapter only" in violation.description


async def test_a_pinned_name_that_comes_to_be_merged_only_is_left_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with rig(tmp_path) as toy:
        await toy.upload("a")
        await toy.adapters.UpdateAdapter(pb.UpdateAdapterRequest(name="a", pinned=True))
        assert toy.engine.stats().pinned
        lowered_by(monkeypatch, only_merged)
        await toy.upload("a", 1, replace=True)
        await toy.server._pins.follow()
        assert not toy.engine.stats().pinned
        answered = await toy.generate(adapter="a")
        assert answered.started.adapter.mode == ADAPTER_MODE_MERGED
