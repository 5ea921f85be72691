"""What pairs of LoRA, and what goes with them, are refused for, each by its name."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from adaplex.adapters.errors import AdapterTooLarge
from adaplex.adapters.formats.lora.config import CONFLICTS, EVERYWHERE
from adaplex.adapters.limits import AdapterLimits
from adaplex.adapters.program.base_spec import BaseSpec
from adapters.handmade import PREFIX
from adapters.lora_parts import BIASES, DOWN, QUERY, TABLE, UP, base, lower, pair, refused, table


def test_the_plain_ones_are_accepted() -> None:
    assert [m.module for m in lower(pair(QUERY)).modules] == [QUERY]
    assert lower(table(), target_modules=[TABLE]).modules[0].primitives == ("low-rank",)


@pytest.mark.parametrize(
    ("field", "value", "reason"),
    [
        ("lora_bias", 1, "must be true or false"),
        ("use_dora", "yes", "must be true or false"),
        ("use_qalora", [1], "must be true or false"),
        ("ensure_weight_tying", "x", "must be true or false"),
        ("modules_to_save", "norm", "must be a list of strings"),
        ("modules_to_save", [1], "must be a list of strings"),
        ("target_parameters", "w", "must be a list of strings"),
        ("target_parameters", {"w": 1}, "must be a list of strings"),
        ("alora_invocation_tokens", [], "must be a list of token ids"),
        ("alora_invocation_tokens", [1, -1], "must be a list of token ids"),
        ("alora_invocation_tokens", [True], "must be a list of token ids"),
        ("alora_invocation_tokens", "1", "must be a list of token ids"),
        ("alora_invocation_tokens", [20], "has token 20, but the base has 20 tokens"),
    ],
)
def test_fields_of_the_wrong_kind(field: str, value: object, reason: str) -> None:
    assert refused(pair(QUERY), **{field: value}) == {field: reason}


USED: dict[str, Any] = {
    "alora_invocation_tokens": [1, 2],
    "target_parameters": ["q_proj.weight"],
    "modules_to_save": ["norm"],
    "trainable_token_indices": [1],
    "bias": "all",
}


@pytest.mark.parametrize(("one", "other"), [(one, o) for one, others in CONFLICTS for o in others])
def test_what_peft_does_not_let_go_together(one: str, other: str) -> None:
    fields = {one: USED.get(one, True), other: USED.get(other, True)}
    assert refused(pair(QUERY), **fields)[other] == f"cannot be combined with {one}"


@pytest.mark.parametrize("field", EVERYWHERE)
def test_activated_lora_changes_no_token_before_its_invocation(field: str) -> None:
    found = refused(pair(QUERY), alora_invocation_tokens=[1], **{field: USED[field]})
    assert found == {field: "changes tokens before the invocation of activated LoRA"}


def test_activated_lora_adapts_no_embedding() -> None:
    found = refused(table(), target_modules=[TABLE], alora_invocation_tokens=[1])
    assert found == {TABLE: "is an embedding, which activated LoRA does not adapt"}


def test_biases_of_lora_b() -> None:
    key = f"{PREFIX}{QUERY}.lora_B.bias"
    assert refused(pair(QUERY), lora_bias=True) == {key: "is missing, but lora_bias is set"}
    there = {key: torch.ones(6)}
    assert refused(pair(QUERY) | there) == {key: "is present, but lora_bias is not set"}
    found = refused(pair(QUERY) | {key: torch.ones(5)}, lora_bias=True)
    assert found == {key: "has shape [5], expected [6]"}
    (module,) = lower(pair(QUERY) | there, lora_bias=True).modules
    assert module.bias is not None
    assert module.bias.tolist() == [2.0] * 6  # scaled


def test_magnitudes() -> None:
    key = f"{PREFIX}{QUERY}.lora_magnitude_vector"
    assert refused(pair(QUERY), use_dora=True) == {key: "is missing, but use_dora is set"}
    there = {key: torch.ones(6)}
    assert refused(pair(QUERY) | there) == {key: "is present, but use_dora is not set"}
    found = refused(pair(QUERY) | {key: torch.ones(8)}, use_dora=True)
    assert found == {key: "has shape [8], expected [6]"}
    unknown = BaseSpec("b", "b", "llama", base().modules, BIASES)
    found = refused(pair(QUERY) | there, use_dora=True, spec=unknown)
    assert found == {QUERY: "DoRA needs the base's weight, which is not available"}
    no_length = base(weight=lambda _: torch.zeros(6, 8))
    idle = pair(QUERY) | {f"{PREFIX}{QUERY}.lora_B.weight": torch.zeros(6, 2)} | there
    assert "overflows" in refused(idle, use_dora=True, spec=no_length)[QUERY]


def test_magnitudes_of_an_embedding_take_memory() -> None:
    weights = table() | {f"{PREFIX}{TABLE}.lora_magnitude_vector": torch.ones(8)}
    fields: dict[str, Any] = {"target_modules": [TABLE], "use_dora": True}
    assert lower(weights, **fields).modules[0].primitives == ("replaced weight",)
    with pytest.raises(AdapterTooLarge, match="takes 320 bytes when lowered, the limit is 319"):
        lower(weights, limits=AdapterLimits(max_adapter_bytes=319), **fields)


def test_pairs_of_the_other_kind() -> None:
    wrong = pair(TABLE, into=20, out=8)
    found = refused(wrong, target_modules=[TABLE])
    assert found == dict.fromkeys(wrong, "does not fit a module of kind embedding")
    half = f"{PREFIX}{TABLE}.lora_embedding_B"
    found = refused({k: v for k, v in table().items() if k != half}, target_modules=[TABLE])
    assert found == {half: "is missing: a pair needs both halves"}
    found = refused(table(3), target_modules=[TABLE])
    assert found[half] == "has shape [8, 3], expected [8, 2]"


@pytest.mark.parametrize(
    ("fields", "pooled"),
    [
        ({"use_qalora": True, "qalora_group_size": 3}, 4),
        ({"use_qalora": True, "qalora_group_size": 4}, 4),
        ({"use_qalora": True, "qalora_group_size": "2"}, 4),
        ({"use_qalora": True, "qalora_group_size": 0}, 4),
        ({"use_qalora": True}, 4),
        ({"use_qalora": False, "qalora_group_size": 2}, 4),
        ({"qalora_group_size": 16}, 4),
        ({}, 4),
    ],
)
def test_pooled_pairs_need_their_group(fields: dict[str, Any], pooled: int) -> None:
    key = f"{PREFIX}{QUERY}.lora_A.weight"
    found = refused(pair(QUERY, into=pooled), **fields)
    assert found == {key: f"has shape [2, {pooled}], expected [2, 8]"}


def test_parameters() -> None:
    found = refused(pair(QUERY), target_parameters=["experts.w1"])
    reason = "matches no parameter of the base org/base that can be adapted"
    assert found == {"target_parameters": reason}
    inner, outer = (
        pair("layers.0.experts.base_layer", rank=6, out=12),
        pair("layers.0.experts", rank=6, into=6, out=8),
    )
    fields: dict[str, Any] = {"target_modules": [], "target_parameters": ["gate_up_proj", DOWN]}
    made = lower(inner | outer, **fields)
    assert [m.module for m in made.modules] == [DOWN, UP]
    assert made.traits.max_rank == 6
    found = refused(outer, **fields)
    assert found == {UP: "is named by target_modules, but has no tensors"}
    found = refused(inner | outer, target_modules=[], target_parameters=["gate_up_proj"])
    assert found.keys() >= set(inner)
    narrow = pair("layers.0.experts", rank=2, into=6, out=8)
    assert len(refused(inner | narrow, **fields)) == 2
    with pytest.raises(AdapterTooLarge, match="has rank 2, the limit is 1"):
        lower(inner | outer, limits=AdapterLimits(max_rank=1), **fields)
    assert lower(inner | outer, limits=AdapterLimits(max_rank=2), **fields)
