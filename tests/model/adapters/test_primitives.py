"""Every primitive, in the layers of any architecture, against a plain model changed by hand."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from adaplex.adapters.program.primitives import Activation, Bottleneck, LowRank, Reads, ReplacedRows
from adaplex.adapters.program.program import AdapterProgram, ModuleProgram
from adaplex.engine.batch import Chunk
from adaplex.engine.request import AdapterMode
from adaplex.engine.sequence import VIRTUAL
from peft_adapters import load_plain
from rig import ModelRig, prompt

LAYER = "model.layers.1"
HIDDEN, MIDDLE, VOCABULARY = 64, 128, 320
FUNCTIONS: dict[Activation, Callable[[Tensor], Tensor]] = {
    Activation.IDENTITY: nn.Identity(),
    Activation.RELU: nn.ReLU(),
    Activation.GELU: nn.GELU(),
    Activation.GELU_TANH: nn.GELU(approximate="tanh"),
    Activation.SILU: nn.SiLU(),
    Activation.TANH: nn.Tanh(),
    Activation.SIGMOID: nn.Sigmoid(),
    Activation.LEAKY_RELU: nn.LeakyReLU(0.01),
}


def rand(*shape: int, seed: int, size: float = 0.3) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * size


DOWN = f"{LAYER}.mlp.down_proj"
ATTENTION, MLP = f"{LAYER}.self_attn", f"{LAYER}.mlp"
EMBEDDING = "model.embed_tokens"
ROWS = ReplacedRows((5, 77, 200), rand(3, HIDDEN, seed=1))
PROGRAMS: dict[str, tuple[ModuleProgram, ...]] = {
    "output-scale": (ModuleProgram(f"{ATTENTION}.q_proj", output_scale=rand(64, seed=2, size=1)),),
    "input-scale": (ModuleProgram(DOWN, input_scale=rand(MIDDLE, seed=3, size=1)),),
    "all-of-a-linear": (
        ModuleProgram(
            f"{ATTENTION}.k_proj",
            LowRank(rand(3, HIDDEN, seed=4), rand(32, 3, seed=5)),
            rand(32, seed=6),
            output_scale=rand(32, seed=7, size=1),
            input_scale=rand(HIDDEN, seed=8, size=1),
        ),
    ),
    "replaced-linear": (
        ModuleProgram(
            DOWN,
            LowRank(rand(2, MIDDLE, seed=9), rand(64, 2, seed=10)),
            weight=rand(HIDDEN, MIDDLE, seed=11, size=0.1),
        ),
    ),
    "norms": (
        ModuleProgram("model.norm", weight=rand(HIDDEN, seed=12, size=1)),
        ModuleProgram(f"{LAYER}.input_layernorm", weight=rand(HIDDEN, seed=13, size=1)),
        ModuleProgram(f"{LAYER}.post_attention_layernorm", bias=rand(HIDDEN, seed=14)),
    ),
    "embedding-pair": (
        ModuleProgram(
            EMBEDDING,
            LowRank(rand(4, VOCABULARY, seed=15), rand(HIDDEN, 4, seed=16), lookup=True),
        ),
    ),
    "embedding-rows": (ModuleProgram(EMBEDDING, rows=ROWS), ModuleProgram("lm_head", rows=ROWS)),
    "embedding-table": (ModuleProgram(EMBEDDING, weight=rand(VOCABULARY, HIDDEN, seed=17)),),
    "virtual": (ModuleProgram(EMBEDDING, virtual=rand(5, HIDDEN, seed=18)),),
    **{
        f"bottleneck-{reads}": (
            ModuleProgram(
                MLP,
                bottleneck=Bottleneck(
                    down=rand(6, HIDDEN, seed=19),
                    up=rand(HIDDEN, 6, seed=20),
                    down_bias=rand(6, seed=21),
                    up_bias=rand(HIDDEN, seed=22),
                    activation=Activation.GELU,
                    reads=reads,
                ),
            ),
        )
        for reads in Reads
    },
    **{
        f"attention-{activation}": (
            ModuleProgram(
                ATTENTION,
                bottleneck=Bottleneck(
                    down=rand(5, HIDDEN, seed=23),
                    up=rand(HIDDEN, 5, seed=24),
                    activation=activation,
                    reads=Reads.SUM,
                ),
            ),
        )
        for activation in Activation
    },
}


def programs() -> dict[str, AdapterProgram]:
    return {name: AdapterProgram(f"sha256:{name}", "x", made) for name, made in PROGRAMS.items()}


@contextmanager
def changed(model: PreTrainedModel, made: ModuleProgram) -> Iterator[None]:
    """Within it, the plain model does what the program does."""
    module: Any = model.get_submodule(made.module)
    before = {k: v.clone() for k, v in module.state_dict().items()}
    handles: list[Any] = []
    if made.bottleneck is not None:
        handles += _with_bottleneck(model, made.module, made.bottleneck)
    elif isinstance(module, nn.Linear):
        handles.append(module.register_forward_hook(_linear_hook(made)))
    elif made.low_rank is not None:
        module.weight.data += (made.low_rank.b @ made.low_rank.a).T
    if made.weight is not None:
        module.weight.data = made.weight.clone()
    if made.rows is not None:
        module.weight.data = module.weight.data.clone()
        module.weight.data[list(made.rows.ids)] = made.rows.weight
    if made.bias is not None and not isinstance(module, nn.Linear):
        bias = made.bias
        handles.append(module.register_forward_hook(lambda _m, _x, y: y + bias))
    yield
    module.load_state_dict(before)
    for handle in handles:
        handle.remove()


def _linear_hook(made: ModuleProgram) -> Any:
    def hook(linear: nn.Linear, args: tuple[Tensor], _y: Tensor) -> Tensor:
        x = args[0] if made.input_scale is None else args[0] * made.input_scale
        y = F.linear(x, linear.weight, linear.bias)
        if made.output_scale is not None:
            y = y * made.output_scale
        if made.low_rank is not None:
            y = y + x @ made.low_rank.a.T @ made.low_rank.b.T
        return y if made.bias is None else y + made.bias

    return hook


def _with_bottleneck(model: PreTrainedModel, name: str, made: Bottleneck) -> list[Any]:
    layer, _, block = name.rpartition(".")
    norm = "input_layernorm" if block == "self_attn" else "post_attention_layernorm"
    seen: dict[str, Tensor] = {}

    def keep(_norm: nn.Module, args: tuple[Tensor], y: Tensor) -> None:
        seen["residual"], seen["input"] = args[0], y

    def hook(_block: nn.Module, _args: Any, output: Any) -> Any:
        y = output[0] if isinstance(output, tuple) else output
        x = {"output": y, "sum": seen["residual"] + y, **seen}[made.reads]
        middle = F.linear(x, made.down, made.down_bias)
        y = y + F.linear(FUNCTIONS[made.activation](middle), made.up, made.up_bias)
        return (y, *output[1:]) if isinstance(output, tuple) else y

    return [
        model.get_submodule(f"{layer}.{norm}").register_forward_hook(keep),
        model.get_submodule(name).register_forward_hook(hook),
    ]


@torch.no_grad()
def expected(model: PreTrainedModel, program: AdapterProgram | None, tokens: list[int]) -> Tensor:
    """Returns fp32 logits after the last token."""
    parts = () if program is None else program.modules
    virtual = next((m.virtual for m in parts if m.virtual is not None), None)
    embedding: Any = model.get_input_embeddings()
    with torch.no_grad():
        stack = [changed(model, m) for m in parts if m.virtual is None]
        for context in stack:
            context.__enter__()
        hidden = embedding(torch.tensor([tokens]))
        if virtual is not None:
            hidden = torch.cat([virtual[None], hidden], dim=1)
        logits: Tensor = model(inputs_embeds=hidden).logits[0, -1]
        for context in reversed(stack):
            context.__exit__(None, None, None)
    return logits


@pytest.mark.parametrize("native", [False, True], ids=["reference", "native"])
@pytest.mark.parametrize("architecture", ["llama", "qwen2"])
def test_a_batch_of_all_primitives_equals_a_changed_model(
    architecture: str, native: bool, tiny_model: Callable[[str], Path]
) -> None:
    model = tiny_model(architecture)
    rig, plain = ModelRig(model, native=native), load_plain(model)
    made = [None, *programs().values(), None]
    refs = [None if program is None else rig.add(program) for program in made]
    prompts = [[*prompt(9 + 5 * i, seed=i), 77, 12, 200] for i in range(len(made))]
    wanted = [expected(plain, p, tokens) for p, tokens in zip(made, prompts, strict=True)]
    for order in (range(len(made)), range(len(made) - 1, -1, -1)):
        rows = [rig.sequence(prompts[i], refs[i]) for i in order]
        together = rig.prefill(*rows)
        for i, row, logits in zip(order, rows, together, strict=True):
            name = "base" if made[i] is None else made[i].digest
            assert (logits - wanted[i]).abs().max() < 1e-4, name
            alone = rig.prefill(rig.sequence(prompts[i], refs[i]))[0]
            assert torch.equal(logits, alone), name
            row.tokens.append(7)
        decoded = rig.decode(*rows)
        for i, logits in zip(order, decoded, strict=True):
            after = expected(plain, made[i], [*prompts[i], 7])
            assert (logits - after).abs().max() < 1e-4
    for program, tokens, logits in zip(made, prompts, wanted, strict=True):
        if program is not None:
            assert (expected(plain, None, tokens) - logits).abs().max() > 1e-2, program.digest


@pytest.mark.parametrize("native", [False, True], ids=["reference", "native"])
def test_merged_rows_equal_a_changed_model(native: bool, tiny_model: Callable[[str], Path]) -> None:
    model = tiny_model("qwen2")
    rig, plain = ModelRig(model, native=native), load_plain(model)
    for i, program in enumerate(programs().values()):
        ref, tokens = rig.add(program, AdapterMode.MERGED), [*prompt(17, seed=i), 77, 5]
        logits, base = rig.prefill(rig.sequence(tokens, ref), rig.sequence(tokens))
        assert (logits - expected(plain, program, tokens)).abs().max() < 1e-4, program.digest
        assert torch.equal(base, rig.prefill(rig.sequence(tokens))[0])


def test_chunks_of_virtual_tokens_and_prompts_give_the_same_bits(
    tiny_model: Callable[[str], Path],
) -> None:
    rig = ModelRig(tiny_model("llama"), native=False)
    ref = rig.add(programs()["virtual"])
    whole = rig.sequence(prompt(20), ref)
    assert whole.tokens[:5] == [VIRTUAL + i for i in range(5)]
    wanted = rig.prefill(whole)[0]
    cut = rig.sequence(prompt(20), ref)
    for start, end in ((0, 3), (3, 4), (4, 11)):
        rig.forward(Chunk(cut, start, end - start))
    assert torch.equal(rig.forward(Chunk(cut, 11, len(cut) - 11))[0], wanted)
