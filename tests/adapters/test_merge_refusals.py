"""Merging: plans and adapters that are refused."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch

from adaplex.adapters.checkpoint import Checkpoint
from adaplex.adapters.compose.merge import (
    MAX_SOURCES,
    MergeMethod,
    MergePlan,
    merge_adapters,
    merge_checkpoints,
)
from adaplex.adapters.errors import AdapterInvalid
from adapters.handmade import BASE, HEAD, HIDDEN, QUERY, checkpoint, tensors
from adapters.merges import EQUAL_RANKS, lower, merged, plan, source


def refusal(plan: MergePlan, *sources: Checkpoint) -> AdapterInvalid:
    with pytest.raises(AdapterInvalid) as refused:
        merged(plan, *sources)
    return refused.value


@pytest.mark.parametrize(
    ("field", "changes"),
    [
        ("weights", {"weights": (1.0,)}),
        ("weights", {"weights": (1.0, math.nan)}),
        ("weights", {"weights": (1.0, math.inf)}),
        ("weights", {"weights": (0.0, 0.0)}),
        ("density", {"method": MergeMethod.TIES}),
        ("density", {"method": MergeMethod.TIES, "density": 0.0}),
        ("density", {"method": MergeMethod.TIES, "density": 1.1}),
        ("density", {"method": MergeMethod.TIES, "density": math.nan}),
        ("density", {"density": 0.5}),
        ("majority_sign", {"majority_sign": "frequency"}),
        ("rank", {"rank": 4}),
        ("rank", {"method": MergeMethod.SVD, "rank": 0}),
        ("seed", {"seed": -1}),
        ("seed", {"seed": 1 << 64}),
    ],
)
def test_a_bad_plan_is_refused_by_field(field: str, changes: dict[str, Any]) -> None:
    good = plan(MergeMethod.LINEAR)
    merged(good)
    assert refusal(replace(good, **changes)).field == field


@pytest.mark.parametrize("count", [0, MAX_SOURCES + 1])
def test_the_number_of_sources_is_limited(count: int) -> None:
    sources = [source(0)] * count
    with pytest.raises(AdapterInvalid) as refused:
        merge_checkpoints(plan(MergeMethod.CAT, *[1.0] * count), sources, BASE)
    assert refused.value.field == "sources"


@pytest.mark.parametrize("method", EQUAL_RANKS)
def test_different_ranks_at_a_module_are_refused_with_what_to_do(method: MergeMethod) -> None:
    error = refusal(plan(method), source(0), source(1, rank=3))
    assert error.field == "method"
    assert "2, 3" in str(error)
    assert "use cat or svd" in str(error)


@pytest.mark.parametrize(
    ("where", "bad"),
    [
        ("lora_magnitude_vector", checkpoint(use_dora=True)),
        ("lm_head", checkpoint(modules_to_save=["lm_head"])),
        ("alora_invocation_tokens", checkpoint(alora_invocation_tokens=[3])),
        (
            HEAD,
            checkpoint(
                tensors() | {f"base_model.model.{HEAD}.weight": torch.ones(24, HIDDEN)},
                modules_to_save=["lm_head"],
            ),
        ),
        (
            "lora_magnitude_vector",
            checkpoint(
                tensors() | {f"base_model.model.{QUERY}.lora_magnitude_vector": torch.ones(HIDDEN)}
            ),
        ),
        ("peft_type", checkpoint(peft_type="XLORA")),
        (
            "q_proj",
            checkpoint(
                tensors("q_proj")
                | {
                    f"base_model.model.{name}.bias": torch.ones(HIDDEN)
                    for name in BASE.modules
                    if name.endswith("q_proj")
                },
                target_modules=["q_proj"],
                bias="lora_only",
            ),
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_cannot_be_merged_is_refused_by_source_and_name(where: str, bad: Checkpoint) -> None:
    error = refusal(plan(MergeMethod.CAT), source(0), bad)
    assert all(r.where.startswith("sources[1].") for r in error.refusals)
    assert where in error.field


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"bias": torch.ones(HIDDEN)}, "a bias cannot be merged"),
        ({"output_scale": torch.ones(HIDDEN)}, "an output scale cannot be merged"),
        ({"input_scale": torch.ones(HIDDEN)}, "an input scale cannot be merged"),
        ({"weight": torch.ones(HIDDEN, HIDDEN)}, "a replaced weight cannot be merged"),
        ({"transform": torch.abs}, "a merged weight cannot be merged"),
    ],
)
def test_other_primitives_than_pairs_are_refused_by_name(
    fields: dict[str, Any], reason: str
) -> None:
    made = lower(source(0))
    other = replace(made, modules=(replace(made.modules[0], **fields),))
    with pytest.raises(AdapterInvalid) as caught:
        merge_adapters(plan(MergeMethod.CAT), [made, other], BASE.modules)
    (found,) = caught.value.refusals
    assert found.where == f"sources[1].{other.modules[0].module}"
    assert found.reason == reason


def test_pairs_of_other_modules_and_invocations_are_refused_by_name() -> None:
    made = lower(source(0))
    name = made.modules[0].module
    modules = {**BASE.modules, name: replace(BASE.modules[name], kind="experts", experts=2)}
    with pytest.raises(AdapterInvalid, match=f"{name}: is of kind experts"):
        merge_adapters(plan(MergeMethod.CAT, 1.0), [made], modules)
    with pytest.raises(AdapterInvalid, match="an invocation cannot be merged"):
        merge_adapters(plan(MergeMethod.CAT, 1.0), [replace(made, invocation=(7,))], BASE.modules)


@pytest.mark.parametrize("method", MergeMethod)
def test_values_that_overflow_are_refused(method: MergeMethod) -> None:
    huge = checkpoint({name: tensor * 0 + 1e30 for name, tensor in tensors().items()})
    error = refusal(plan(method, 1e38, 1e38), huge, huge)
    assert error.field == "weights"
    assert "overflow" in str(error)
