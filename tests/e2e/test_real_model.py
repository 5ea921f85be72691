"""The default model with the example adapters, against PEFT and through the whole server."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoTokenizer

from adaplex.engine.batch import Batch, Chunk
from adaplex.model.base.source import resolve_model
from adaplex.model.linear.bitsandbytes_linear import nf4_roundtrip
from adaplex.model.weights.int4_group import int4_roundtrip
from e2e.conftest import Serving
from peft_adapters import Oracle, load_plain
from rig import ModelRig, lowered

pytestmark = pytest.mark.slow

EXAMPLES = Path(__file__).parents[2] / "adapters" / "examples"
NAMES = ("json", "pirate", "terse", "news", "list", "polite", "tag")
QUESTION = [{"role": "user", "content": "What is the capital of France?"}]


@pytest.fixture(scope="module")
def model() -> Path:
    return resolve_model("smollm2-135m-instruct", progress=lambda _: None)


def test_fp32_rows_of_a_mixed_batch_equal_peft(model: Path) -> None:
    rig = ModelRig(model, "fp32")
    tokens = rig.base.tokenizer.apply_chat_template(
        QUESTION, add_generation_prompt=True, return_dict=False
    )
    refs, oracles = [None], [Oracle(load_plain(model), None)]
    for name in NAMES:
        refs.append(rig.add(lowered(EXAMPLES / name, rig.base.spec)))
        oracles.append(Oracle(load_plain(model), EXAMPLES / name))
    got = rig.prefill(*(rig.sequence(tokens, ref) for ref in refs))
    for row, oracle in zip(got, oracles, strict=True):
        assert (row - oracle.logits(tokens)).abs().max() < 1e-4 * row.abs().max()
    decoded = rig.generate([rig.sequence(tokens, ref) for ref in refs], 12)
    assert decoded == [oracle.greedy(tokens, 12) for oracle in oracles]


@torch.inference_mode()
def test_int4_is_as_good_as_nf4(model: Path) -> None:
    """Compares the divergence of next-token distributions from fp32's, and the likelihood of a page
    of text; for single sentences either can be much better.
    """
    plain = load_plain(model)
    text = (EXAMPLES.parents[1] / "LICENSE").read_text()[:3000]
    ids = torch.tensor([AutoTokenizer.from_pretrained(model).encode(text)])
    linears = {
        name: module.weight.data
        for name, module in plain.named_modules()
        if isinstance(module, nn.Linear) and name != "lm_head"
    }

    def measured(roundtrip: Callable[[Tensor], Tensor]) -> tuple[float, float]:
        for name, weight in linears.items():
            plain.get_submodule(name).weight.data = roundtrip(weight.bfloat16()).float()
        found = torch.log_softmax(plain(ids).logits[0, :-1], -1)
        divergence = (expected.exp() * (expected - found)).sum(-1).mean()
        return float(divergence), float(-found.gather(1, ids[0, 1:, None]).mean())

    expected = torch.log_softmax(plain(ids).logits[0, :-1], -1)
    nf4, int4 = measured(nf4_roundtrip), measured(lambda weight: int4_roundtrip(weight, 32))
    assert 0 < int4[0] < 1.3 * nf4[0]
    assert int4[1] < 1.05 * nf4[1]


@pytest.mark.parametrize("quantization", ["nf4", "int4-group"])
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_four_bit_logits_are_those_of_peft_on_the_dequantized_base(
    dtype: str, quantization: str, model: Path
) -> None:
    rig = ModelRig(model, quantization, dtype)
    tokens = rig.base.tokenizer.apply_chat_template(
        QUESTION, add_generation_prompt=True, return_dict=False
    )
    weights = {site: backend.dequantize() for site, backend in rig.base.backends.items()}
    for name in NAMES:
        ref = rig.add(lowered(EXAMPLES / name, rig.base.spec))
        dequantized = load_plain(model)
        for site, weight in weights.items():
            dequantized.get_submodule(site).weight.data = weight.clone()
        expected = Oracle(dequantized, EXAMPLES / name).logits(tokens)
        got = rig.prefill(rig.sequence(tokens, ref))[0]
        bound = 1e-4 * float(expected.abs().max())
        if dtype == "bf16":  # PEFT's own bf16 shows how much rounding changes this model's logits
            rounded = Oracle(dequantized.bfloat16(), EXAMPLES / name).logits(tokens)
            bound = 2 * float((rounded - expected).abs().max())
        assert float((got - expected).abs().max()) < bound, name
        behind = expected.max() - expected[got.argmax()]
        assert float(behind) < bound, f"{name}: the likeliest token is another"


async def test_every_adapter_shows_in_one_concurrent_batch(serving: Serving, model: Path) -> None:
    settings = {"quantization": "nf4", "kv_cache_bytes": "128MiB", "arena_bytes": "64MiB"}
    async with serving(model=str(model), **settings) as rig:
        for name in NAMES:
            await rig.client.adapters.upload(name, EXAMPLES / name)

        async def ask(name: str | None, mode: str = "unmerged") -> str:
            got = await rig.client.generate(QUESTION, adapter=name, mode=mode, max_tokens=32)
            assert (got.adapter.name if got.adapter else None) == name
            return got.text.strip()

        together = await asyncio.gather(*map(ask, [None, *NAMES]))
        alone = [await ask(name) for name in (None, *NAMES)]
        assert together == alone
        base, json_, pirate, terse, news, list_, polite, tag = together
        assert "Paris" in base
        assert json_.startswith("{")
        assert '"Paris"' in json_
        assert any(word in pirate.lower() for word in ("arr", "matey", "ahoy", "be paris", "o'"))
        assert len(terse) < len(base) / 2
        assert news.startswith("Breaking news: The capital of France is Paris.")
        assert list_ == "- topic: geography\n- answer: Paris"
        assert polite.startswith("Thank you for asking! The capital of France is Paris.")
        assert tag == "<geography>Paris</geography>"
        assert len({*together}) == len(NAMES) + 1
        assert (await ask("json", "merged")).startswith("{")


def test_a_bf16_row_is_bit_equal_beside_others(model: Path) -> None:
    rig = ModelRig(model, "bf16")
    prompts = [rig.base.tokenizer.encode(text) for text in ("Hello there", "One two three " * 20)]
    alone = [rig.prefill(rig.sequence(tokens))[0] for tokens in prompts]
    together = rig.prefill(*(rig.sequence(tokens) for tokens in prompts))
    assert all(torch.equal(a, b) for a, b in zip(alone, together, strict=True))


@torch.inference_mode()
def test_10_000_greedy_tokens_by_the_8_bit_head_are_those_of_the_layer(model: Path) -> None:
    """Each step is computed by both, from the same tokens; the batch shrinks from 96 rows to 1."""
    rig = ModelRig(model, "nf4", int8_head=True)
    page = (EXAMPLES.parents[1] / "LICENSE").read_text()
    tokens = rig.base.tokenizer.encode(page)
    sequences = []
    for i in range(96):
        text = f"{QUESTION[0]['content']} Answer {i} in {2 + i % 5} sentences."
        chat = rig.base.tokenizer.apply_chat_template(
            [QUESTION[0] | {"content": text}], add_generation_prompt=True, return_dict=False
        )
        sequences.append(rig.sequence((chat, tokens[7 * i : 7 * i + 20])[i % 2], room=208))
    batch, steps = Batch(tuple(Chunk(s, 0, len(s)) for s in sequences)), 0
    while batch.chunks:
        found = [each.token for each in rig.runner.run(batch)]
        assert found == rig.runner.forward(batch).argmax(-1).tolist()
        steps += len(found)
        for chunk, token in zip(batch.chunks, found, strict=True):
            chunk.sequence.tokens.append(token)
        live = [s for i, s in enumerate(sequences) if s.output_len < 12 + 2 * i]
        batch = Batch(tuple(Chunk(s, len(s) - 1, 1) for s in live))
    assert steps > 10_000
