"""A fake model for the server's tests: base, tokenizer and runner in plain Python."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import torch

from adaplex.adapters.program.base_spec import BaseModule, BaseSpec
from adaplex.adapters.program.program import AdapterProgram
from adaplex.engine.batch import Batch
from adaplex.engine.merge_cost_model import FoldedShare, StepCosts
from adaplex.engine.request import Logprob, Request, SampledToken

EOS = 256
VOCAB = 257
MODEL = "toy"
FEATURES = 8
BASE = BaseSpec(
    name=MODEL,
    digest="sha256:" + "0" * 64,
    fingerprint="sha256:" + "1" * 64,
    model_type="llama",
    modules={
        name: BaseModule(name, "linear", FEATURES, FEATURES)
        for name in ("model.layers.0.self_attn.q_proj", "model.layers.0.self_attn.v_proj")
    },
    weight=lambda _: torch.zeros(FEATURES, FEATURES),
)


class ByteTokenizer:
    """Tokens are bytes of UTF-8; 256 ends a text."""

    chat_template = "yes"

    def __call__(self, text: str) -> SimpleNamespace:
        return SimpleNamespace(input_ids=list(text.encode()))

    def apply_chat_template(self, conversation: list[dict[str, str]], **options: Any) -> list[int]:
        if conversation[0]["role"] == "assistant":
            raise ValueError("the user speaks first")
        return [byte for m in conversation for byte in f"{m['role']}:{m['content']}\n".encode()]

    def decode(self, token_ids: list[int], **options: Any) -> str:
        return bytes(t for t in token_ids if t < EOS).decode(errors="replace")


def shifted_echo(request: Request) -> list[int]:
    """Returns the prompt and EOS; an adapter adds the first digit of its digest in front."""
    mark = [ord(request.adapter.digest[7])] if request.adapter else []
    return [*mark, *request.prompt, EOS]


@dataclass
class FakeRunner:
    """Generates the tokens that `answer` returns; steps are slow while `gate` is closed."""

    answer: Callable[[Request], list[int]] = shifted_echo
    gate: threading.Event = field(default_factory=threading.Event)
    slow: float = 0.05
    """Seconds of a step while the gate is closed."""
    failure: Exception | None = None

    def __post_init__(self) -> None:
        self.gate.set()

    def run(self, batch: Batch) -> list[SampledToken]:
        self.gate.wait(self.slow)
        if self.failure is not None:
            raise self.failure
        return [self._next(chunk.sequence) for chunk in batch.sampling]

    def _next(self, sequence: Any) -> SampledToken:
        answer = self.answer(sequence.request)
        token = answer[len(sequence.output) % len(answer)]
        wanted = sequence.request.sampling.logprobs
        logprob = None if wanted is None else Logprob(token, -0.5, ((token, -0.5),) * wanted)
        return SampledToken(token, logprob)

    def pack_adapter(self, program: AdapterProgram) -> None: ...

    def remove_host(self, digest: str) -> None: ...

    def copy_adapter(self, digest: str, offset: int, nbytes: int) -> None: ...

    def load_adapter(self, program: AdapterProgram, offset: int, nbytes: int) -> None: ...

    def remove_adapter(self, digest: str) -> None: ...

    def build_merged(self, program: AdapterProgram) -> int:
        return 100

    def measure_merge(self, program: AdapterProgram) -> FoldedShare:
        return FoldedShare(100)

    def remove_merged(self, digest: str) -> None: ...

    def step_costs(self) -> StepCosts:
        return StepCosts((1, 2), (1.0, 1.0), (1.0, 1.0), (0.1, 0.1), 0.1)
