"""Keys and values before the prompt, in both layouts of the cache, against transformers' own."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from adaplex.adapters.program.primitives import KVPrefix, LowRank
from adaplex.adapters.program.program import AdapterProgram, ModuleProgram
from adaplex.engine.batch import Batch, Chunk
from adaplex.engine.request import AdapterMode
from adaplex.engine.sequence import Sequence
from adaplex.model.forward.native_forward import NativeForward
from adaplex.model.forward.torch_forward import TorchForward
from peft_adapters import load_plain
from rig import BLOCK, ModelRig, prompt

TOKENS = 21
"""Tokens of a prefix: a whole block, and a part of one."""
ROUNDING = {"fp32": 1e-5, "bf16": 0.06}
FORWARDS = {True: NativeForward, False: TorchForward}


def rand(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * 0.5


def make_rig(model: Path, native: bool, quantization: str = "fp32") -> ModelRig:
    rig = ModelRig(model, quantization, native=native)
    assert type(rig.runner._forward) is FORWARDS[native]
    return rig


def prefix_modules(rig: ModelRig, tokens: int = TOKENS, seed: int = 0) -> tuple[ModuleProgram, ...]:
    spec = rig.base.spec
    return tuple(
        ModuleProgram(
            m.name, prefix=KVPrefix(*_pair(spec.kv_shapes[m.layer], tokens, seed, m.layer))
        )
        for m in sorted(spec.modules.values(), key=lambda module: module.name)
        if m.part == "attention"
    )


def _pair(shape: tuple[int, int, int], tokens: int, seed: int, layer: int) -> tuple[Tensor, Tensor]:
    heads, key, value = shape
    number = 1000 * seed + 10 * layer
    return rand(tokens, heads, key, seed=number), rand(tokens, heads, value, seed=number + 1)


def program(
    rig: ModelRig, *others: ModuleProgram, seed: int = 0, name: str = "p"
) -> AdapterProgram:
    modules = sorted((*prefix_modules(rig, seed=seed), *others), key=lambda m: m.module)
    return AdapterProgram(f"sha256:{name}", "prefix", tuple(modules))


@torch.no_grad()
def expected(model: PreTrainedModel, made: AdapterProgram, tokens: list[int]) -> Tensor:
    """Returns transformers' fp32 logits after the last token, with past keys and values."""
    cache, layers = DynamicCache(), [m for m in made.modules if m.prefix is not None]
    for layer, module in enumerate(layers):
        assert module.prefix is not None
        keys, values = module.prefix.keys, module.prefix.values
        cache.update(keys.transpose(0, 1)[None], values.transpose(0, 1)[None], layer)
    virtual = next((m.virtual for m in made.modules if m.virtual is not None), None)
    hidden = model.get_input_embeddings()(torch.tensor([tokens]))  # type: ignore[operator]
    if virtual is not None:
        hidden = torch.cat([virtual[None], hidden], dim=1)
    logits: Tensor = model(inputs_embeds=hidden, past_key_values=cache, use_cache=True).logits
    return logits[0, -1]


@pytest.mark.parametrize(
    ("architecture", "native"),
    [("llama", True), ("qwen3", True), ("llama", False), ("qwen2", False), ("gpt2", False)],
)
def test_a_prompt_behind_a_prefix_equals_one_behind_past_keys_and_values(
    architecture: str, native: bool, tiny_model: Callable[[str], Path]
) -> None:
    model = tiny_model(architecture)
    rig, plain = make_rig(model, native), load_plain(model)
    made = [program(rig, seed=seed, name=f"p{seed}") for seed in range(2)]
    refs = [rig.add(each) for each in made]
    tokens = [prompt(11, seed=1), prompt(40, seed=2), prompt(11, seed=1)]
    rows = [rig.sequence(t, ref) for t, ref in zip(tokens, [*refs, None], strict=True)]
    together = rig.prefill(*rows)
    for each, row, ids, logits in zip(made, rows, tokens, together, strict=False):
        assert (logits - expected(plain, each, ids)).abs().max() < 1e-4
        assert torch.equal(logits, rig.prefill(rig.sequence(ids, row.adapter))[0])
        row.tokens.append(7)
        after = rig.decode(row)[0]
        assert (after - expected(plain, each, [*ids, 7])).abs().max() < 1e-4
    assert torch.equal(together[2], rig.prefill(rig.sequence(tokens[2]))[0])
    assert (together[0] - together[2]).abs().max() > 1e-2


@pytest.mark.parametrize("quantization", ["fp32", "bf16"])
@pytest.mark.parametrize("native", [True, False])
def test_any_chunks_give_the_same_bits(
    native: bool, quantization: str, tiny_model: Callable[[str], Path]
) -> None:
    """Also a chunk within the prefix only, and one beside rows of another sequence."""
    rig = make_rig(tiny_model("llama"), native, quantization)
    ref = rig.add(program(rig))
    ids, other = prompt(20), rig.sequence(prompt(30))
    whole = rig.prefill(rig.sequence(ids, ref))[0]
    for ends in ((5, 16, 21), (1, 22), (17, 30, 40), (20, 21)):
        cut, start = rig.sequence(ids, ref), 0
        for end in ends:
            batch = Batch((Chunk(cut, start, end - start),))
            assert rig.runner.run(batch) == []
            start = end
        rows = rig.forward(Chunk(cut, start, len(cut) - start), Chunk(other, 0, len(other)))
        assert torch.equal(rows[0], whole)


@pytest.mark.parametrize("native", [True, False])
def test_blocks_of_another_tenant_leave_nothing_behind(
    native: bool, tiny_model: Callable[[str], Path]
) -> None:
    """As after a preemption: the blocks had other content meanwhile."""
    rig = make_rig(tiny_model("llama"), native)
    refs = [rig.add(program(rig, seed=seed, name=f"p{seed}")) for seed in range(2)]
    sequence, other = rig.sequence(prompt(20), refs[0]), rig.sequence(prompt(30), refs[1])
    first = rig.prefill(sequence)[0]
    other.blocks = sequence.blocks
    rig.prefill(other)
    assert torch.equal(rig.prefill(sequence)[0], first)


@pytest.mark.parametrize("native", [True, False])
def test_a_shared_block_of_a_prefix_is_not_written_again(
    native: bool, tiny_model: Callable[[str], Path]
) -> None:
    rig = make_rig(tiny_model("llama"), native)
    ref = rig.add(program(rig))
    first, second = rig.sequence(prompt(20), ref), rig.sequence(prompt(20), ref)
    logits = rig.prefill(first)[0]
    second.blocks[0] = first.blocks[0]
    rest = rig.forward(Chunk(second, BLOCK, len(second) - BLOCK))[0]
    assert torch.equal(rest, logits)


@pytest.mark.parametrize("native", [True, False])
def test_a_merged_adapter_keeps_its_prefix(native: bool, tiny_model: Callable[[str], Path]) -> None:
    rig = make_rig(tiny_model("llama"), native)
    name = "model.layers.0.self_attn.q_proj"
    pair = LowRank(rand(3, 64, seed=90), rand(64, 3, seed=91))
    made = program(rig, ModuleProgram(name, pair))
    tokens = prompt(20)
    apart = rig.prefill(rig.sequence(tokens, rig.add(made)))[0]
    merged = rig.prefill(rig.sequence(tokens, rig.add(made, AdapterMode.MERGED)))[0]
    prefix_alone = rig.prefill(rig.sequence(tokens, rig.add(program(rig, name="alone"))))[0]
    assert (apart - merged).abs().max() < 1e-4
    assert (apart - prefix_alone).abs().max() > 1e-2


@pytest.mark.parametrize("native", [True, False])
def test_virtual_tokens_come_behind_the_prefix(
    native: bool, tiny_model: Callable[[str], Path]
) -> None:
    model = tiny_model("llama")
    rig = make_rig(model, native)
    made = program(rig, ModuleProgram("model.embed_tokens", virtual=rand(6, 64, seed=92)))
    tokens, ref = prompt(13), rig.add(made)
    assert ref.traits.leading == TOKENS + 6
    logits = rig.prefill(rig.sequence(tokens, ref))[0]
    assert (logits - expected(load_plain(model), made, tokens)).abs().max() < 1e-4
    cut = rig.sequence(tokens, ref)
    for start, end in ((0, 10), (10, 24), (24, 30)):
        rig.forward(Chunk(cut, start, end - start))
    assert torch.equal(rig.forward(Chunk(cut, 30, len(cut) - 30))[0], logits)


@pytest.mark.parametrize("quantization", ["fp32", "bf16"])
def test_both_layouts_have_the_same_keys_and_values(
    quantization: str, tiny_model: Callable[[str], Path]
) -> None:
    """Writing the torch cache's rows by `write_kv` changes the C cache by rounding only."""
    rig = make_rig(tiny_model("llama"), True, quantization)
    slow = make_rig(tiny_model("llama"), False, quantization)
    sequence, same = rig.sequence(prompt(37)), slow.sequence(prompt(37))
    rig.prefill(sequence)
    slow.prefill(same)
    size = -(-37 // BLOCK)

    def blocks_of(each: ModelRig, of: Sequence) -> list[Tensor]:
        cache = each.base.step.cache
        assert cache is not None
        return [t[:, of.blocks[:size]].clone() for t in (*cache.keys, *cache.values)]

    before = blocks_of(rig, sequence)
    cache = slow.base.step.cache
    assert cache is not None
    slots = torch.arange(37)
    slots = torch.tensor(sequence.blocks)[slots // BLOCK] * BLOCK + slots % BLOCK
    tables = torch.tensor(same.blocks[:size])
    for layer, (keys, values) in enumerate(zip(cache.keys, cache.values, strict=True)):
        rows = [t[:, tables].flatten(1, 2)[:, :37] for t in (keys, values)]
        rig.runner._prefixes._write_kv(layer, slots, *rows)
    for found, wanted in zip(blocks_of(rig, sequence), before, strict=True):
        torch.testing.assert_close(found, wanted, atol=ROUNDING[quantization], rtol=0)
        assert wanted.abs().max() > 0.1
