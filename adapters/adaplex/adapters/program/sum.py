"""Sum: one program that adds the weighted changes of several adapters to each module's output.

y = W x + sum over the adapters of w_i (y_i - W x). Low-rank pairs stack, biases and scales add,
and bottlenecks are concatenated, so the sum is exact, and is packed and batched like any adapter.
Primitives that do not fit into one ModuleProgram, or are not linear in their weight, are refused
by name.
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
"""Primitives whose change is linear in the adapter's weight."""
SINGLE = ("replaced weight", "replaced rows", "KV prefix", "merged weight")
"""Primitives that at most one adapter may have at a module."""
EXCLUSIVE = (
    ("input scale", ("low-rank", "output scale", "replaced weight")),
    ("replaced weight", ("output scale", "replaced rows")),
    ("merged weight", (*sorted(WEIGHABLE), "replaced weight", "replaced rows")),
)
"""Primitives, and those that another adapter may not have at the same module: the first would
change the result of the second."""

Term = tuple[float, ModuleProgram]
"""Weight and program of one adapter at one module."""


@dataclass(frozen=True)
class Effect:
    """Names of what one adapter does at a module: enough to detect conflicts without tensors."""

    weight: float
    primitives: Collection[str]
    bottleneck: str
    """Input and activation of the bottleneck; empty without one."""


def sum_programs(
    terms: Sequence[tuple[float, AdapterProgram]], base: BaseSpec, *, digest: str, family: str
) -> AdapterProgram:
    """Returns the sum of weighted programs, in fp32. Virtual tokens are concatenated in the order
    of the terms.

    Raises AdapterInvalid, naming modules, for primitives that cannot be summed, or tensors that
    overflow bf16.
    """
    by_module: defaultdict[str, list[Term]] = defaultdict(list)
    for weight, program in terms:
        for module in program.modules:
            by_module[module.module].append((weight, module))
    refusals = [
        Refusal(name, problem)
        for name, found in by_module.items()
        if (problem := conflict([effect_of(weight, module) for weight, module in found]))
    ]
    invocations = {program.invocation for _, program in terms}
    if len(invocations) > 1:
        refusals.append(Refusal("alora_invocation_tokens", "differ between the adapters"))
    if refusals:
        raise AdapterInvalid(refusals)
    modules = tuple(_module(base, name, by_module[name]) for name in sorted(by_module))
    refusals = [
        Refusal(module.module, f"its {role}, weighted, overflows bf16")
        for module in modules
        for role, tensor in module.tensors()
        if not bool(torch.isfinite(tensor.to(torch.bfloat16)).all())
    ]
    if refusals:
        raise AdapterInvalid(refusals)
    notes = dict.fromkeys(note for _, program in terms for note in program.notes)
    warnings = dict.fromkeys(warning for _, program in terms for warning in program.warnings)
    (invocation,) = invocations
    return AdapterProgram(digest, family, modules, tuple(notes), tuple(warnings), invocation)


def conflict(effects: Sequence[Effect]) -> str | None:
    """Returns why the effects of adapters at one module cannot be summed, or None."""
    for effect in effects:
        names = set(effect.primitives)
        fixed = names - WEIGHABLE or ("input scale" in names and names - {"input scale", "bias"})
        if effect.weight != 1.0 and fixed:
            return f"its {', '.join(sorted(fixed))} must have weight 1"
    for name in SINGLE:
        if sum(name in effect.primitives for effect in effects) > 1:
            return f"more than one adapter has a {name} there"
    for name, others in EXCLUSIVE:
        for i, effect in enumerate(effects):
            if name in effect.primitives:
                beside = {p for j, e in enumerate(effects) if j != i for p in e.primitives}
                if clash := sorted(beside & set(others)):
                    return f"one adapter's {name} would change another's {', '.join(clash)}"
    if len({effect.bottleneck for effect in effects} - {""}) > 1:
        return "its bottlenecks differ in input or activation"
    return None


def effect_of(weight: float, module: ModuleProgram) -> Effect:
    """Returns the effect of a program at a module."""
    return Effect(weight, module.primitives, bottleneck_kind(module.bottleneck))


def bottleneck_kind(bottleneck: Bottleneck | None) -> str:
    """Returns the input and activation of a bottleneck, empty without one."""
    return "" if bottleneck is None else f"{bottleneck.reads} {bottleneck.activation}"


def _module(base: BaseSpec, name: str, terms: Sequence[Term]) -> ModuleProgram:
    """Returns the sum at one module. The terms have no conflict."""
    pairs = [(weight, m.low_rank) for weight, m in terms if m.low_rank is not None]
    bottlenecks = [(weight, m.bottleneck) for weight, m in terms if m.bottleneck is not None]
    virtual = [m.virtual.float() for _, m in terms if m.virtual is not None]
    scales = [weight * m.scale for weight, m in terms if m.low_rank is not None]
    return ModuleProgram(
        name,
        _sum_pairs(pairs, base.modules[name].experts) if pairs else None,
        _sum_tensors(terms, lambda m: m.bias),
        scales[0] if len(scales) == 1 else 1.0,
        output_scale=_sum_tensors(terms, lambda m: m.output_scale, neutral=1.0),
        input_scale=_sum_tensors(terms, lambda m: m.input_scale, neutral=1.0),
        weight=next((m.weight for _, m in terms if m.weight is not None), None),
        rows=next((m.rows for _, m in terms if m.rows is not None), None),
        bottleneck=_sum_bottlenecks(bottlenecks) if bottlenecks else None,
        virtual=torch.cat(virtual) if virtual else None,
        prefix=next((m.prefix for _, m in terms if m.prefix is not None), None),
        transform=next((m.transform for _, m in terms if m.transform is not None), None),
    )


def _sum_tensors(
    terms: Sequence[Term], of: Callable[[ModuleProgram], Tensor | None], neutral: float = 0.0
) -> Tensor | None:
    """Returns neutral + sum of w (tensor - neutral), or None if no term has the tensor."""
    found = [(weight, of(module)) for weight, module in terms]
    changes = [
        weight * (tensor.float() - neutral) for weight, tensor in found if tensor is not None
    ]
    return sum(changes[1:], changes[0]) + neutral if changes else None


def _sum_pairs(pairs: Sequence[tuple[float, LowRank]], experts: int) -> LowRank:
    """Returns one pair: rows of `a` stacked, weighted columns of `b` side by side, expert by expert
    where the module has experts.
    """
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


def _sum_bottlenecks(terms: Sequence[tuple[float, Bottleneck]]) -> Bottleneck:
    """Returns one bottleneck whose width is the sum of the given widths."""
    first = terms[0][1]
    down_bias = None
    if any(bottleneck.down_bias is not None for _, bottleneck in terms):
        biases = [
            torch.zeros(len(bottleneck.down))
            if bottleneck.down_bias is None
            else bottleneck.down_bias.float()
            for _, bottleneck in terms
        ]
        down_bias = torch.cat(biases)
    ups = [weight * b.up_bias.float() for weight, b in terms if b.up_bias is not None]
    return Bottleneck(
        torch.cat([bottleneck.down.float() for _, bottleneck in terms]),
        torch.cat([weight * bottleneck.up.float() for weight, bottleneck in terms], dim=1),
        down_bias,
        sum(ups[1:], ups[0]) if ups else None,
        first.activation,
        first.reads,
    )
