"""Joined: several adapters as one, each adding its own change to what a module gives.

y = W x + sum over the adapters of w_i (y_i - W x). Low-rank pairs stack, biases and scales add,
bottlenecks stand beside each other: exact, lowered, packed and batched like any adapter. What has
no place in one ModuleProgram, or is not linear in its weight, is refused by name.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from adaplex.adapters.errors import AdapterInvalid, Refusal
from adaplex.adapters.program.base_spec import BaseSpec
from adaplex.adapters.program.primitives import Bottleneck, LowRank
from adaplex.adapters.program.program import AdapterProgram, ModuleProgram

WEIGHABLE = frozenset(["low-rank", "bias", "output scale", "input scale", "bottleneck"])
"""Primitives whose change is linear in the weight."""
SINGLE = ("replaced weight", "replaced rows", "KV prefix", "merged weight")
"""Primitives that only one adapter can have at a module."""
APART = (
    ("input scale", ("low-rank", "output scale", "replaced weight")),
    ("replaced weight", ("output scale", "replaced rows")),
    ("merged weight", (*sorted(WEIGHABLE), "replaced weight", "replaced rows")),
)
"""Primitives that change what others of another adapter would do."""

Weighted = tuple[float, ModuleProgram]


@dataclass(frozen=True)
class Effect:
    """What one adapter does at a module, as far as joining asks: it needs no tensors."""

    weight: float
    primitives: Collection[str]
    bottleneck: str
    """What the bottleneck reads and its activation; empty without one."""


def summed(
    parts: Sequence[tuple[float, AdapterProgram]], base: BaseSpec, *, digest: str, family: str
) -> AdapterProgram:
    """One program out of weighted ones, in fp32; virtual tokens follow each other in their order.

    Raises AdapterInvalid, naming modules, for what cannot be summed, or overflows bf16.
    """
    weighted: defaultdict[str, list[Weighted]] = defaultdict(list)
    for weight, program in parts:
        for module in program.modules:
            weighted[module.module].append((weight, module))
    refusals = [
        Refusal(name, problem)
        for name, found in weighted.items()
        if (problem := conflict([effect(weight, module) for weight, module in found]))
    ]
    invocations = {program.invocation for _, program in parts}
    if len(invocations) > 1:
        refusals.append(Refusal("alora_invocation_tokens", "differ between what is summed"))
    if refusals:
        raise AdapterInvalid(refusals)
    modules = tuple(_module(base, name, weighted[name]) for name in sorted(weighted))
    refusals = [
        Refusal(module.module, f"its {role}, weighted, overflows")
        for module in modules
        for role, tensor in module.tensors()
        if not bool(torch.isfinite(tensor.to(torch.bfloat16)).all())
    ]
    if refusals:
        raise AdapterInvalid(refusals)
    notes = dict.fromkeys(note for _, program in parts for note in program.notes)
    warnings = dict.fromkeys(warning for _, program in parts for warning in program.warnings)
    (invocation,) = invocations
    return AdapterProgram(digest, family, modules, tuple(notes), tuple(warnings), invocation)


def conflict(effects: Sequence[Effect]) -> str | None:
    """Why what adapters do at one module cannot be summed; None when it can."""
    for effect in effects:
        names = set(effect.primitives)
        fixed = names - WEIGHABLE or ("input scale" in names and names - {"input scale", "bias"})
        if effect.weight != 1.0 and fixed:
            return f"its {', '.join(sorted(fixed))} takes no weight but 1"
    for name in SINGLE:
        if sum(name in effect.primitives for effect in effects) > 1:
            return f"more than one adapter has a {name} there"
    for name, others in APART:
        for i, effect in enumerate(effects):
            if name in effect.primitives:
                beside = {p for j, e in enumerate(effects) if j != i for p in e.primitives}
                if clash := sorted(beside & set(others)):
                    return f"one adapter's {name} would change another's {', '.join(clash)}"
    if len({effect.bottleneck for effect in effects} - {""}) > 1:
        return "its bottlenecks differ in what they read or in activation"
    return None


def effect(weight: float, module: ModuleProgram) -> Effect:
    """What a program does at a module."""
    return Effect(weight, module.primitives, kind(module.bottleneck))


def kind(bottleneck: Bottleneck | None) -> str:
    """What a bottleneck reads, and its activation."""
    return "" if bottleneck is None else f"{bottleneck.reads} {bottleneck.activation}"


def _module(base: BaseSpec, name: str, parts: Sequence[Weighted]) -> ModuleProgram:
    """The primitives of one module. There is no conflict between them."""
    pairs = [(weight, m.low_rank) for weight, m in parts if m.low_rank is not None]
    bottlenecks = [(weight, m.bottleneck) for weight, m in parts if m.bottleneck is not None]
    virtual = [m.virtual.float() for _, m in parts if m.virtual is not None]
    scales = [weight * m.scale for weight, m in parts if m.low_rank is not None]
    return ModuleProgram(
        name,
        _stacked(pairs, base.modules[name].experts) if pairs else None,
        _sum(parts, lambda m: m.bias),
        scales[0] if len(scales) == 1 else 1.0,
        output_scale=_sum(parts, lambda m: m.output_scale, neutral=1.0),
        input_scale=_sum(parts, lambda m: m.input_scale, neutral=1.0),
        weight=next((m.weight for _, m in parts if m.weight is not None), None),
        rows=next((m.rows for _, m in parts if m.rows is not None), None),
        bottleneck=_widened(bottlenecks) if bottlenecks else None,
        virtual=torch.cat(virtual) if virtual else None,
        prefix=next((m.prefix for _, m in parts if m.prefix is not None), None),
        transform=next((m.transform for _, m in parts if m.transform is not None), None),
    )


def _sum(
    parts: Sequence[Weighted], of: Callable[[ModuleProgram], Tensor | None], neutral: float = 0.0
) -> Tensor | None:
    """neutral + sum of w (tensor - neutral); None where no part has one."""
    found = [(weight, of(module)) for weight, module in parts]
    changes = [
        weight * (tensor.float() - neutral) for weight, tensor in found if tensor is not None
    ]
    return sum(changes[1:], changes[0]) + neutral if changes else None


def _stacked(pairs: Sequence[tuple[float, LowRank]], experts: int) -> LowRank:
    """a one below the other, weighted b side by side; expert by expert where there are several."""
    first = pairs[0][1]
    each = experts or 1
    a = [pair.a.float().unflatten(0, (each, -1)) for _, pair in pairs]
    b = [weight * pair.b.float().unflatten(1, (each, -1)) for weight, pair in pairs]
    return LowRank(
        torch.cat(a, dim=1).flatten(0, 1),
        torch.cat(b, dim=2).flatten(1, 2),
        group=math.gcd(*(pair.group for _, pair in pairs)),
        lookup=first.lookup,
    )


def _widened(parts: Sequence[tuple[float, Bottleneck]]) -> Bottleneck:
    """Bottlenecks beside each other: one whose width is the sum of theirs."""
    first = parts[0][1]
    down_bias = None
    if any(bottleneck.down_bias is not None for _, bottleneck in parts):
        biases = [
            torch.zeros(len(bottleneck.down))
            if bottleneck.down_bias is None
            else bottleneck.down_bias.float()
            for _, bottleneck in parts
        ]
        down_bias = torch.cat(biases)
    ups = [weight * b.up_bias.float() for weight, b in parts if b.up_bias is not None]
    return Bottleneck(
        torch.cat([bottleneck.down.float() for _, bottleneck in parts]),
        torch.cat([weight * bottleneck.up.float() for weight, bottleneck in parts], dim=1),
        down_bias,
        sum(ups[1:], ups[0]) if ups else None,
        first.activation,
        first.reads,
    )
