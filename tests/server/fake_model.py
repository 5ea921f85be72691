"""A fake model for the server's tests: base, tokenizer and runner in plain Python."""

from __future__ import annotations

import threading
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, ClassVar

import torch

from adaplex.adapters.program.base_spec import BaseModule, BaseSpec
from adaplex.engine.batch import Chunk
from adaplex.engine.request import Logprob, Request, SampledToken
from fake_runner import FakeRunner

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
    added_tokens_decoder: ClassVar = {EOS: "<eos>"}

    def __call__(self, text: str, **options: Any) -> SimpleNamespace:
        return SimpleNamespace(input_ids=list(text.encode()))

    def apply_chat_template(self, conversation: list[dict[str, str]], **options: Any) -> Any:
        if conversation[0]["role"] == "assistant":
            raise ValueError("the user speaks first")
        known = [m for m in conversation if m["role"] != "robot"]
        text = "".join(f"{m['role']}:{m['content']}\n" for m in known)
        return list(text.encode()) if options["tokenize"] else text

    def decode(self, token_ids: list[int], **options: Any) -> str:
        return bytes(t for t in token_ids if t < EOS).decode(errors="replace")


def shifted_echo(request: Request) -> list[int]:
    """Returns the prompt and EOS; an adapter adds the first digit of its digest in front."""
    mark = [ord(request.adapter.digest[7])] if request.adapter else []
    return [*mark, *request.prompt, EOS]


class ScriptedRunner(FakeRunner):
    """A FakeRunner that generates the tokens of `script`; steps are slow while `gate` is closed."""

    def __init__(
        self,
        script: Callable[[Request], list[int]] = shifted_echo,
        *,
        slow: float = 0.05,
        failure: Exception | None = None,
    ) -> None:
        """`slow`: seconds of a step while the gate is closed."""
        super().__init__(block_tokens=16)
        self.script, self.failure = script, failure
        self.gate = threading.Event()
        self.gate.set()
        self.on_run = lambda: self.gate.wait(slow)

    def sample(self, chunk: Chunk) -> SampledToken:
        sequence = chunk.sequence
        tokens = self.script(sequence.request)
        token = tokens[len(sequence.output) % len(tokens)]
        count = sequence.request.sampling.logprobs
        logprob = None if count is None else Logprob(token, -0.5, ((token, -0.5),) * count)
        return SampledToken(token, logprob)
