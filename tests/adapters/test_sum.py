"""Sums of adapters: each adds its own change, at every kind of module; the rest is refused."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from adaplex.adapters.compose.mix import (
    Component,
    Mix,
    check_mix,
    mix_packed_bytes,
    mix_ranks,
    mixed_program,
)
from adaplex.adapters.errors import AdapterInvalid
from adaplex.adapters.program.base_spec import BaseModule, BaseSpec
from adaplex.adapters.program.primitives import (
    Activation,
    Bottleneck,
    KVPrefix,
    LowRank,
    Reads,
    ReplacedRows,
)
from adaplex.adapters.program.program import AdapterProgram, ModuleProgram
from adaplex.adapters.program.report import describe
from adaplex.adapters.program.sum import sum_programs

HIDDEN, VOCAB, OUT, EXPERTS = 8, 12, 6, 3
EMBEDDING, LINEAR, NORM = "model.embed_tokens", "model.layers.0.self_attn.q_proj", "model.norm"
ATTENTION, MLP = "model.layers.0.self_attn", "model.layers.0.mlp"
GROUPED = "model.layers.0.mlp.experts.down_proj"
BASE = BaseSpec(
    "org/base",
    "digest",
    "llama",
    {
        module.name: module
        for module in (
            BaseModule(EMBEDDING, "embedding", VOCAB, HIDDEN),
            BaseModule(LINEAR, "linear", HIDDEN, OUT, has_bias=True),
            BaseModule(NORM, "norm", HIDDEN, HIDDEN),
            BaseModule(ATTENTION, "block", HIDDEN, HIDDEN, layer=0, part="attention"),
            BaseModule(MLP, "block", HIDDEN, HIDDEN, layer=0, part="mlp"),
            BaseModule(GROUPED, "experts", HIDDEN, OUT, experts=EXPERTS),
        )
    },
    kv_shapes=((2, 4, 4),),
)
A, B = (f"sha256:{letter * 64}" for letter in "ab")


class Dice:
    """Random tensors and primitives."""

    def __init__(self, seed: int) -> None:
        self._generator = torch.Generator().manual_seed(seed)

    def tensor(self, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=self._generator)

    def pair(self, rank: int, inputs: int = HIDDEN, outputs: int = OUT, **fields: Any) -> LowRank:
        return LowRank(self.tensor(rank, inputs), self.tensor(outputs, rank), **fields)

    def bottleneck(self, width: int, reads: Reads = Reads.SUM, *, bias: bool = True) -> Bottleneck:
        return Bottleneck(
            self.tensor(width, HIDDEN),
            self.tensor(HIDDEN, width),
            self.tensor(width) if bias else None,
            self.tensor(HIDDEN) if bias else None,
            Activation.TANH,
            reads,
        )

    def prefix(self) -> KVPrefix:
        return KVPrefix(self.tensor(3, 2, 4), self.tensor(3, 2, 4))


def program(*modules: ModuleProgram, digest: str = A, **fields: Any) -> AdapterProgram:
    return AdapterProgram(digest, "any", modules, **fields)


def add(*parts: tuple[float, ModuleProgram]) -> ModuleProgram:
    """Of one module."""
    made = sum_programs(
        [(weight, program(module)) for weight, module in parts], BASE, digest="", family="hybrid"
    )
    (module,) = made.modules
    return module


def linear(module: ModuleProgram, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """What a linear gives, as ModuleProgram says."""
    x = x if module.input_scale is None else x * module.input_scale
    y = functional.linear(x, weight if module.weight is None else module.weight, bias)
    y = y if module.output_scale is None else y * module.output_scale
    if module.low_rank is not None:
        y = y + x @ module.low_rank.a.T @ module.low_rank.b.T
    return y if module.bias is None else y + module.bias


def widened(bottleneck: Bottleneck, x: Tensor) -> Tensor:
    """What a bottleneck adds."""
    inner = functional.linear(x, bottleneck.down, bottleneck.down_bias).tanh()
    return functional.linear(inner, bottleneck.up, bottleneck.up_bias)


LINEARS: dict[str, Callable[[Dice], list[tuple[float, ModuleProgram]]]] = {
    "pairs": lambda dice: [
        (0.5, ModuleProgram(LINEAR, dice.pair(2))),
        (-2.0, ModuleProgram(LINEAR, dice.pair(3), dice.tensor(OUT))),
    ],
    "output scales, pairs and biases, as of DoRA": lambda dice: [
        (1.5, ModuleProgram(LINEAR, dice.pair(2), output_scale=dice.tensor(OUT))),
        (0.5, ModuleProgram(LINEAR, dice.pair(1), output_scale=dice.tensor(OUT))),
        (-1.0, ModuleProgram(LINEAR, bias=dice.tensor(OUT))),
    ],
    "input scales and a bias": lambda dice: [
        (0.5, ModuleProgram(LINEAR, input_scale=dice.tensor(HIDDEN))),
        (2.0, ModuleProgram(LINEAR, input_scale=dice.tensor(HIDDEN))),
        (1.0, ModuleProgram(LINEAR, bias=dice.tensor(OUT))),
    ],
    "a replaced weight, a pair and a bias": lambda dice: [
        (1.0, ModuleProgram(LINEAR, weight=dice.tensor(OUT, HIDDEN))),
        (0.5, ModuleProgram(LINEAR, dice.pair(2), dice.tensor(OUT))),
    ],
}


@pytest.mark.parametrize("name", LINEARS)
def test_changes_of_a_linear_add(name: str) -> None:
    dice = Dice(0)
    parts = LINEARS[name](dice)
    x, weight, bias = dice.tensor(5, HIDDEN), dice.tensor(OUT, HIDDEN), dice.tensor(OUT)
    idle = linear(ModuleProgram(LINEAR), x, weight, bias)
    expected = idle + sum(w * (linear(part, x, weight, bias) - idle) for w, part in parts)
    torch.testing.assert_close(linear(add(*parts), x, weight, bias), expected)


def test_bottlenecks_add_whether_they_have_biases_or_not() -> None:
    dice = Dice(1)
    parts = [(0.5, dice.bottleneck(2)), (-2.0, dice.bottleneck(3, bias=False))]
    made = add(*((w, ModuleProgram(MLP, bottleneck=part)) for w, part in parts)).bottleneck
    assert made is not None
    assert (made.reads, made.activation, len(made.down)) == (Reads.SUM, Activation.TANH, 5)
    x = dice.tensor(4, HIDDEN)
    expected = sum(w * widened(part, x) for w, part in parts)
    torch.testing.assert_close(widened(made, x), expected)


def test_pairs_of_experts_stack_expert_by_expert() -> None:
    dice = Dice(2)
    parts = [
        (0.5, dice.pair(2 * EXPERTS)),
        (3.0, dice.pair(1 * EXPERTS)),
    ]
    made = add(*((w, ModuleProgram(GROUPED, part)) for w, part in parts)).low_rank
    assert made is not None
    for expert in range(EXPERTS):
        expected = sum(w * delta(part, expert) for w, part in parts)
        torch.testing.assert_close(delta(made, expert), expected)


def delta(pair: LowRank, expert: int) -> Tensor:
    """[out, in] of one expert."""
    a, b = pair.a.unflatten(0, (EXPERTS, -1)), pair.b.unflatten(1, (EXPERTS, -1))
    return b[:, expert] @ a[expert]


def test_what_is_known_of_pairs_is_kept() -> None:
    dice = Dice(3)
    made = add(
        (1.0, ModuleProgram(LINEAR, dice.pair(1, group=4))),
        (1.0, ModuleProgram(LINEAR, dice.pair(1, group=6))),
    ).low_rank
    assert made is not None
    assert (made.group, made.lookup) == (2, False)
    pair = dice.pair(2, VOCAB, HIDDEN, lookup=True)
    made = add((0.5, ModuleProgram(EMBEDDING, pair)), (1.0, ModuleProgram(EMBEDDING, pair)))
    assert made.low_rank is not None
    assert made.low_rank.lookup


def test_what_stands_by_itself_is_kept_beside_the_others() -> None:
    dice = Dice(4)
    rows, tokens = ReplacedRows((1, 5), dice.tensor(2, HIDDEN)), dice.tensor(4, HIDDEN)
    pair = dice.pair(2, VOCAB, HIDDEN, lookup=True)
    made = add(
        (1.0, ModuleProgram(EMBEDDING, rows=rows)),
        (1.0, ModuleProgram(EMBEDDING, virtual=tokens)),
        (0.5, ModuleProgram(EMBEDDING, pair)),
        (1.0, ModuleProgram(EMBEDDING, virtual=tokens[:1])),
    )
    assert made.rows == rows
    assert made.virtual is not None
    assert torch.equal(made.virtual, torch.cat([tokens, tokens[:1]]))
    prefix, bottleneck = dice.prefix(), dice.bottleneck(2)
    made = add(
        (1.0, ModuleProgram(ATTENTION, prefix=prefix)),
        (0.5, ModuleProgram(ATTENTION, bottleneck=bottleneck)),
    )
    assert made.prefix == prefix
    assert made.primitives == ("bottleneck", "KV prefix")


def test_the_invocation_that_all_have_is_kept() -> None:
    module = ModuleProgram(LINEAR, Dice(5).pair(1))
    parts = [(1.0, program(module, invocation=(7, 8)))] * 2
    assert sum_programs(parts, BASE, digest="", family="").invocation == (7, 8)
    with pytest.raises(AdapterInvalid, match="alora_invocation_tokens: differ"):
        sum_programs([*parts, (1.0, program(module))], BASE, digest="", family="")


def one(times: float, module: str, /, **primitives: Any) -> tuple[float, ModuleProgram]:
    return times, ModuleProgram(module, **primitives)


DICE = Dice(6)
SCALE, WEIGHT = {"input_scale": DICE.tensor(HIDDEN)}, {"weight": DICE.tensor(OUT, HIDDEN)}
GAIN, PAIR = {"output_scale": DICE.tensor(OUT)}, {"low_rank": DICE.pair(2)}
ROWS = {"rows": ReplacedRows((1,), DICE.tensor(1, HIDDEN))}
TOKENS, PREFIX = {"virtual": DICE.tensor(2, HIDDEN)}, {"prefix": DICE.prefix()}
MERGED = {"transform": lambda weight: weight * 2}
REFUSED: dict[str, tuple[list[tuple[float, ModuleProgram]], str]] = {
    "half a weight": ([one(0.5, LINEAR, **WEIGHT)], "replaced weight must have weight 1"),
    "half a norm": ([one(0.5, NORM, weight=DICE.tensor(HIDDEN))], "must have weight 1"),
    "half of rows": ([one(0.5, EMBEDDING, **ROWS)], "replaced rows must have weight 1"),
    "half of tokens": ([one(0.5, EMBEDDING, **TOKENS)], "virtual tokens must have weight 1"),
    "half a prefix": ([one(0.5, ATTENTION, **PREFIX)], "KV prefix must have weight 1"),
    "half a transform": ([one(0.5, LINEAR, **MERGED)], "merged weight must have weight 1"),
    "half of both scales": ([one(0.5, LINEAR, **SCALE, **GAIN)], "output scale must have weight 1"),
    "two weights": ([one(1, LINEAR, **WEIGHT)] * 2, "more than one adapter has a replaced weight"),
    "two rows": ([one(1, EMBEDDING, **ROWS)] * 2, "more than one adapter has a replaced rows"),
    "two prefixes": ([one(1, ATTENTION, **PREFIX)] * 2, "more than one adapter has a KV prefix"),
    "two transforms": ([one(1, LINEAR, **MERGED)] * 2, "more than one adapter has a merged weight"),
    "a transform and a pair": (
        [one(1, LINEAR, **MERGED), one(1, LINEAR, **PAIR)],
        "merged weight would change another's low-rank",
    ),
    "an input scale and a pair": (
        [one(1, LINEAR, **PAIR), one(1, LINEAR, **SCALE)],
        "input scale would change another's low-rank",
    ),
    "an input and an output scale": (
        [one(1, LINEAR, **GAIN), one(1, LINEAR, **SCALE)],
        "input scale would change another's output scale",
    ),
    "an input scale and a weight": (
        [one(1, LINEAR, **SCALE), one(1, LINEAR, **WEIGHT)],
        "input scale would change another's replaced weight",
    ),
    "an output scale and a weight": (
        [one(1, LINEAR, **GAIN), one(1, LINEAR, **WEIGHT)],
        "replaced weight would change another's output scale",
    ),
    "rows and a table": (
        [one(1, EMBEDDING, **ROWS), one(1, EMBEDDING, weight=DICE.tensor(VOCAB, HIDDEN))],
        "replaced weight would change another's replaced rows",
    ),
    "bottlenecks that read other things": (
        [one(1, MLP, bottleneck=DICE.bottleneck(2, reads)) for reads in (Reads.SUM, Reads.OUTPUT)],
        "differ in input or activation",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_has_no_sum_is_refused_with_tensors_and_without(name: str) -> None:
    parts, reason = REFUSED[name]
    with pytest.raises(AdapterInvalid, match=reason) as refused:
        add(*parts)
    assert [refusal.where for refusal in refused.value.refusals] == [parts[0][1].module]
    programs = {f"sha256:{i:064x}": program(m, digest=f"sha256:{i:064x}") for i, (_, m) in
                enumerate(parts)}  # fmt: skip
    weights = [weight for weight, _ in parts]
    mix = Mix.of(Component(*p) for p in zip(programs, weights, strict=True))
    reports = [describe(part, BASE, 4) for part in programs.values()]
    with pytest.raises(AdapterInvalid) as refused:
        check_mix(mix, reports, dict.fromkeys(programs, "tone"))
    assert refused.value.field == "adapters"
    assert "tone" in str(refused.value)


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ([{"virtual": True}, {"virtual": True}], "one and two all put tokens before the prompt"),
        ([{"invocation": (7,)}, {}], "one and two begin at different invocations"),
        ([{"merged": True}, {}], "one can only be served merged"),
    ],
)
def test_mixes_whose_order_or_place_would_not_be_clear(
    fields: list[dict[str, Any]], reason: str
) -> None:
    def made(digest: str, wanted: dict[str, Any]) -> AdapterProgram:
        modules = [ModuleProgram(LINEAR, **(MERGED if "merged" in wanted else PAIR))]
        if "virtual" in wanted:
            modules.insert(0, ModuleProgram(EMBEDDING, **TOKENS))
        return program(*modules, digest=digest, invocation=wanted.get("invocation", ()))

    programs = [made(digest, wanted) for digest, wanted in zip((A, B), fields, strict=True)]
    reports = [describe(part, BASE, 4) for part in programs]
    mix = Mix.of([Component(A, 1.0), Component(B, 1.0)])
    with pytest.raises(AdapterInvalid, match=reason) as refused:
        check_mix(mix, reports, {A: "one", B: "two"})
    assert refused.value.field == "adapters"


@pytest.mark.parametrize("element_bytes", [2, 4])
def test_reports_are_enough_to_know_the_size_of_any_family(element_bytes: int) -> None:
    dice = Dice(7)
    first = program(
        ModuleProgram(EMBEDDING, dice.pair(1, VOCAB, HIDDEN, lookup=True), **TOKENS),
        ModuleProgram(MLP, bottleneck=dice.bottleneck(2)),
        ModuleProgram(GROUPED, dice.pair(EXPERTS)),
        ModuleProgram(ATTENTION, bottleneck=dice.bottleneck(3, bias=False), **PREFIX),
        ModuleProgram(LINEAR, **PAIR, **GAIN),
        ModuleProgram(NORM, weight=dice.tensor(HIDDEN)),
    )
    second = program(
        ModuleProgram(EMBEDDING, **ROWS),
        ModuleProgram(MLP, bottleneck=dice.bottleneck(5, bias=False)),
        ModuleProgram(GROUPED, dice.pair(2 * EXPERTS)),
        ModuleProgram(ATTENTION, bottleneck=dice.bottleneck(1)),
        ModuleProgram(LINEAR, dice.pair(4), dice.tensor(OUT)),
        digest=B,
    )
    mix = Mix.of([Component(A, 1.0), Component(B, 1.0)])
    reports = [describe(part, BASE, element_bytes) for part in (first, second)]
    check_mix(mix, reports, {A: "one", B: "two"})
    made = mixed_program(mix, [first, second], BASE)
    assert mix_packed_bytes(reports, element_bytes) == made.packed_bytes(element_bytes)
    assert mix_ranks(reports) == {
        m.module: m.low_rank.rank if m.low_rank else 0 for m in made.modules
    }
    assert (made.prefix_tokens, made.virtual_tokens) == (3, 2)
