"""Adapters with positions before the prompt, or an invocation, on a real engine short of blocks."""

from __future__ import annotations

from collections.abc import Callable
from itertools import count
from pathlib import Path

import pytest
import torch
from torch import Tensor

from adaplex.adapters.program.primitives import KVPrefix, LowRank
from adaplex.adapters.program.program import AdapterProgram, ModuleProgram
from adaplex.engine.config import EngineConfig
from adaplex.engine.engine import Engine
from adaplex.engine.observer import SilentObserver
from adaplex.engine.request import AdapterMode, AdapterRef, Request, SamplingParams
from rig import ARENA, BLOCK, ModelRig, prompt

QUERY, EMBEDDING = "model.layers.1.self_attn.q_proj", "model.embed_tokens"
INVOCATION = (301, 302)
ANSWER = 40


class Preemptions(SilentObserver):
    """Counts preemptions."""

    def __init__(self) -> None:
        self.count = 0

    def preempted(self) -> None:
        self.count += 1


def rand(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * 0.5


def programs(rig: ModelRig) -> list[AdapterProgram]:
    """Returns adapters with a prefix, with virtual tokens, with both, and with an invocation."""
    spec = rig.base.spec
    attention = [m for m in spec.modules.values() if m.part == "attention"]
    prefix = [
        ModuleProgram(
            m.name,
            prefix=KVPrefix(rand(21, heads, key, seed=m.layer), rand(21, heads, value, seed=9)),
        )
        for m in attention
        for heads, key, value in [spec.kv_shapes[m.layer]]
    ]
    virtual = ModuleProgram(EMBEDDING, virtual=rand(18, 64, seed=20))
    pair = ModuleProgram(QUERY, LowRank(rand(4, 64, seed=21), rand(64, 4, seed=22)))
    made = {
        "prefix": prefix,
        "virtual": [virtual, pair],
        "both": [*prefix, virtual],
        "invoked": [pair],
    }
    return [
        AdapterProgram(
            f"sha256:{name}",
            name,
            tuple(sorted(modules, key=lambda m: m.module)),
            invocation=INVOCATION if name == "invoked" else (),
        )
        for name, modules in made.items()
    ]


def ref(program: AdapterProgram, mode: AdapterMode) -> AdapterRef:
    size = program.packed_bytes(4)
    return AdapterRef(program.family, 1, program.digest, size, program.traits, mode)


def answers(
    rig: ModelRig, requests: list[Request], **limits: int
) -> tuple[dict[str, list[int]], int]:
    """Runs requests on a new engine; returns tokens by request, and preemptions."""
    observer = Preemptions()
    sizes = {"num_blocks": 129, "max_model_len": 256, "max_running": 8, "max_waiting": 32}
    sizes |= {"max_step_tokens": 96, "max_chunk_tokens": 64, "merged_bytes": 1 << 24}
    config = EngineConfig(block_tokens=BLOCK, arena_bytes=ARENA, **sizes | limits)
    clock = map(float, count())  # a second a step, so batches are the same
    engine = Engine(
        config,
        rig.runner,
        rig.programs,
        base_digest="base",
        observer=observer,
        clock=clock.__next__,
    )
    tokens: dict[str, list[int]] = {request.request_id: [] for request in requests}
    for request in requests:
        engine.add(request)
    while engine.has_work:
        for output in engine.step():
            assert output.error is None
            tokens[output.request_id] += output.tokens
        engine.check_integrity()
    for digest in rig.programs:
        engine.unload(digest)
    engine.close()
    return tokens, observer.count


@pytest.mark.parametrize("native", [True, False])
def test_preemption_chunks_and_company_change_no_token(
    native: bool, tiny_model: Callable[[str], Path]
) -> None:
    rig = ModelRig(tiny_model("llama"), native=native)
    made = programs(rig)
    rig.programs |= {program.digest: program for program in made}
    refs: list[AdapterRef | None] = [None]
    refs += [ref(program, mode) for program in made for mode in AdapterMode if mode != "auto"]
    requests = [
        Request(
            f"{adapter.name}/{adapter.mode}" if adapter else "base",
            (*prompt(17), *INVOCATION, *prompt(5, seed=2)),
            SamplingParams(max_tokens=ANSWER, repetition_penalty=1.3, frequency_penalty=0.2),
            adapter,
        )
        for adapter in refs
    ]
    alone: dict[str, list[int]] = {}
    for request in requests:
        alone |= answers(rig, [request])[0]
    assert {len(tokens) for tokens in alone.values()} == {ANSWER}
    assert len({tuple(tokens) for tokens in alone.values()}) >= 5
    together, preempted = answers(
        rig, requests, num_blocks=20, max_step_tokens=24, max_chunk_tokens=7
    )
    assert together == alone
    assert preempted > 0
    assert answers(rig, requests[::-1])[0] == alone
