"""Merges the LoRA checkpoints of several adapters into one."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor

from adaplex.adapters.checkpoint import Checkpoint
from adaplex.adapters.compose.merge.arithmetic import Arithmetic, Factors, Pair
from adaplex.adapters.compose.merge.plan import MergePlan
from adaplex.adapters.errors import AdapterInvalid, Refusal
from adaplex.adapters.formats import lower
from adaplex.adapters.formats.lowering_context import PREFIX
from adaplex.adapters.limits import AdapterLimits
from adaplex.adapters.program.base_match import FINGERPRINT, NAME, QUANTIZATION
from adaplex.adapters.program.base_spec import BaseModule, BaseSpec
from adaplex.adapters.program.program import AdapterProgram, ModuleProgram


def merge_checkpoints(
    plan: MergePlan, checkpoints: Sequence[Checkpoint], base: BaseSpec
) -> Checkpoint:
    """Returns a LoRA checkpoint of the merged adapter, in fp32, every module with scale 1.

    The checkpoint names the base that all sources name, if they agree.
    Raises AdapterInvalid naming the field of the plan, or the source.
    """
    limits = AdapterLimits().for_stored()
    programs = [_lowered(i, checkpoint, base, limits) for i, checkpoint in enumerate(checkpoints)]
    merged = merge_adapters(plan, programs, base.modules)
    return Checkpoint({**merged.config, **_base_names(checkpoints)}, merged.tensors)


def merge_adapters(
    plan: MergePlan, programs: Sequence[AdapterProgram], modules: Mapping[str, BaseModule]
) -> Checkpoint:
    """Returns what `merge_checkpoints` does, for lowered adapters.

    `modules` are the base's; their order determines which values are dropped at random.
    """
    plan.check(len(programs))
    factors = _factors_by_module(plan, programs, modules)
    largest = max(program.traits.max_rank for program in programs)
    arithmetic = Arithmetic(plan, plan.rank or largest)
    pairs = {name: _merged(arithmetic, name, factors[name]) for name in modules if name in factors}
    assert pairs.keys() == factors.keys()
    tensors: dict[str, Tensor] = {}
    for name, (a, b) in pairs.items():
        tensors |= {f"{PREFIX}{name}.lora_A.weight": a, f"{PREFIX}{name}.lora_B.weight": b}
    return Checkpoint(_config({name: len(a) for name, (a, _) in pairs.items()}), tensors)


def _lowered(
    index: int, checkpoint: Checkpoint, base: BaseSpec, limits: AdapterLimits
) -> AdapterProgram:
    try:
        return lower(checkpoint, base, limits)
    except AdapterInvalid as error:
        raise AdapterInvalid(
            [Refusal(f"sources[{index}].{r.where}", r.reason) for r in error.refusals]
        ) from None


def _factors_by_module(
    plan: MergePlan, programs: Sequence[AdapterProgram], modules: Mapping[str, BaseModule]
) -> dict[str, list[Factors]]:
    """Returns the factors of each module, in the order of the sources. Raises AdapterInvalid."""
    factors: dict[str, list[Factors]] = {}
    refusals = []
    for i, (weight, program) in enumerate(zip(plan.weights, programs, strict=True)):
        if program.invocation:
            where = f"sources[{i}].alora_invocation_tokens"
            refusals.append(Refusal(where, "an invocation cannot be merged"))
        for module in program.modules:
            if reasons := list(_unmergeable(module, modules[module.module])):
                refusals += [Refusal(f"sources[{i}].{module.module}", r) for r in reasons]
            else:
                factors.setdefault(module.module, []).append(_factors(module, weight))
    if not plan.method.any_ranks:
        for name, found in factors.items():
            if len(ranks := sorted({len(source.a) for source in found})) > 1:
                listed = ", ".join(map(str, ranks))
                reason = f"{plan.method} needs equal ranks, {name} has {listed}; use cat or svd"
                refusals.append(Refusal("method", reason))
    if refusals:
        raise AdapterInvalid(refusals)
    return factors


def _unmergeable(module: ModuleProgram, base: BaseModule) -> Iterator[str]:
    """Yields reasons why a source's program at a module is not plain LoRA of a linear."""
    for name in module.primitives:
        if name != "low-rank":
            yield f"{'an' if name[0] in 'io' else 'a'} {name} cannot be merged"
    if base.kind != "linear":
        yield f"is of kind {base.kind}; only linears can be merged"


def _factors(module: ModuleProgram, weight: float) -> Factors:
    assert module.low_rank is not None
    b = module.low_rank.b.float() / module.scale
    return Factors(module.low_rank.a.float(), b, module.scale, weight)


def _merged(arithmetic: Arithmetic, name: str, sources: Sequence[Factors]) -> Pair:
    """Returns the merged pair of one module. Raises AdapterInvalid if it overflows."""
    try:
        return arithmetic.merged(sources)
    except OverflowError:
        raise AdapterInvalid.because("weights", f"make {name} overflow") from None


def _base_names(checkpoints: Sequence[Checkpoint]) -> dict[str, Any]:
    """Returns the fields naming the base on which all sources agree."""
    first, *others = (checkpoint.config for checkpoint in checkpoints)
    return {
        field: first[field]
        for field in (NAME, FINGERPRINT, QUANTIZATION)
        if first.get(field) and all(other.get(field) == first[field] for other in others)
    }


def _config(ranks: Mapping[str, int]) -> dict[str, Any]:
    """Returns a PEFT config that targets just these modules, each with alpha equal to its rank."""
    most = max(ranks.values())
    patterns = {f"^{re.escape(name)}": rank for name, rank in ranks.items() if rank != most}
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": most,
        "lora_alpha": most,
        "rank_pattern": patterns,
        "alpha_pattern": patterns,
        "target_modules": sorted(ranks),
        "bias": "none",
        "inference_mode": True,
    }
