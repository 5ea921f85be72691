from __future__ import annotations

import time
from typing import Any

import pytest
import torch

from adapters.handmade import BASE, DOWN, HEAD, HIDDEN, PREFIX, QUERY, VALUE, pair, tensors
from adapters.plain_lora import A_QUERY, B_QUERY, lower, refusals, without


def test_ranks_differ_by_pattern() -> None:
    weights = tensors("v_proj") | tensors("q_proj", rank=5)
    program = lower(weights, rank_pattern={"q_proj": 5})
    ranks = {m.module: m.low_rank.rank for m in program.modules if m.low_rank is not None}
    assert ranks[QUERY] == 5
    assert ranks[VALUE] == 2
    assert program.traits.max_rank == 5
    scales = {m.module: m.scale for m in program.modules}
    assert scales[QUERY] == pytest.approx(4 / 5)


def test_targets_and_tensors_must_name_the_same_modules() -> None:
    assert refusals(without(A_QUERY, B_QUERY)) == {
        QUERY: "is named by target_modules, but has no tensors"
    }
    assert refusals(tensors() | pair(DOWN)) == {
        DOWN: "has tensors, but target_modules does not name it"
    }
    assert refusals(target_modules=["q_proj", "v_proj"], exclude_modules=[QUERY]) == {
        QUERY: "has tensors, but target_modules does not name it"
    }


def test_unknown_modules_are_named_with_the_base() -> None:
    other = f"{PREFIX}model.layers.9.self_attn.q_proj.lora_A.weight"
    found = refusals(tensors() | {other: torch.ones(2, HIDDEN)})
    assert found == {"model.layers.9.self_attn.q_proj": "the base org/tiny-base has no such module"}


def test_targets_that_match_nothing_are_refused() -> None:
    found = refusals(target_modules=["qkv"])
    assert found["target_modules"] == "matches no module of the base org/tiny-base"


@pytest.mark.parametrize(
    "targets",
    [
        ["q_proj", "v_proj", "nowhere"],
        r".*\.(q|v)_proj",
        [name for name in BASE.modules if name.endswith(("q_proj", "v_proj"))],
    ],
)
def test_ways_to_name_the_same_targets(targets: Any) -> None:
    assert len(lower(target_modules=targets).modules) == 4


def test_all_linear_leaves_the_head_out() -> None:
    weights = tensors("q_proj", "v_proj", "down_proj")
    assert HEAD not in {m.module for m in lower(weights, target_modules="all-linear").modules}
    assert HEAD in refusals(weights | pair(HEAD), target_modules="All-Linear")
    weights = tensors("lm_head")
    assert [m.module for m in lower(weights, target_modules=["lm_head"]).modules] == [HEAD]


@pytest.mark.parametrize(
    "fields",
    [
        {"layers_to_transform": 0},
        {"layers_to_transform": [0]},
        {"layers_to_transform": [0, 7], "layers_pattern": "layers"},
        {"layers_to_transform": [0], "layers_pattern": ["h", "layers"]},
        {"layers_to_transform": [0], "layers_pattern": "(layers|h)"},
    ],
)
def test_layers_may_be_chosen(fields: dict[str, Any]) -> None:
    program = lower(pair(QUERY) | pair(VALUE), **fields)
    assert {module.module for module in program.modules} == {QUERY, VALUE}


def test_a_layers_pattern_that_fits_no_layer_targets_nothing() -> None:
    found = refusals(layers_to_transform=[0], layers_pattern="blocks")
    assert "matches no module" in found["target_modules"]


SLOW = r"(?:[a-z]|[a-z_.]|[0-9a-z])*(?<=!)"
PATTERN_FIELDS: dict[str, Any] = {
    "target_modules": lambda pattern: pattern,
    "exclude_modules": lambda pattern: pattern,
    "rank_pattern": lambda pattern: {pattern: 2},
    "alpha_pattern": lambda pattern: {pattern: 2},
    "layers_pattern": lambda pattern: pattern,
}


@pytest.mark.parametrize("field", PATTERN_FIELDS)
@pytest.mark.parametrize(
    ("pattern", "reason"),
    [
        (SLOW, "takes longer than"),
        ("(", "is not a valid pattern"),
        ("(?R)", "is not a valid pattern"),
        (r"\L<names>", "is not a valid pattern"),
        ("x{99999999999}", "is not a valid pattern"),
        ("(" * 900 + ")" * 900, "is not a valid pattern"),
        ("x" * 2001, "characters, the limit is 2000"),
        ("(?:(?:(?:x{999}){999}){999}){999}", "characters when expanded"),
        ("(?:" * 60 + "a|b" + ")+" * 60, "characters when expanded"),
    ],
)
def test_hostile_patterns_end_quickly_with_a_refusal(field: str, pattern: str, reason: str) -> None:
    fields: dict[str, Any] = {field: PATTERN_FIELDS[field](pattern)}
    if field == "layers_pattern":
        fields["layers_to_transform"] = [0]
    started = time.monotonic()
    found = refusals(**fields)
    assert time.monotonic() - started < 5
    assert reason in found[field]
    assert len(found[field]) < 300


@pytest.mark.parametrize("pattern", ["(a+)+$", r"(.*)*x", "(x+x+)+y", r"([a-z_.]+\d?)+!"])
def test_patterns_that_stall_re_do_not_stall(pattern: str) -> None:
    started = time.monotonic()
    assert "target_modules" in refusals(target_modules=pattern)
    assert time.monotonic() - started < 5
