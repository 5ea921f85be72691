"""What replaced weights and trained tokens are refused for, each by its name."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor

from adaplex.adapters import formats
from adaplex.adapters.checkpoint import Checkpoint
from adaplex.adapters.errors import AdapterInvalid
from adaplex.adapters.program.base_spec import BaseModule, BaseSpec
from adaplex.adapters.program.program import AdapterProgram
from adapters.handmade import PREFIX
from adapters.lora_parts import (
    BIASES,
    DOWN,
    GATE,
    HEAD,
    LIMITS,
    NORM,
    QUERY,
    TABLE,
    UP,
    WEIGHTS,
    base,
    lower,
    pair,
    refused,
    table,
)


def rows(module: str, count: int = 2) -> dict[str, Tensor]:
    return {f"{PREFIX}{module}.token_adapter.trainable_tokens_delta": torch.ones(count, 8)}


def test_replaced_weights_and_copies() -> None:
    key = f"{PREFIX}{GATE}.weight"
    other = pair(QUERY) | {key: WEIGHTS[GATE] * 1.1}
    assert "name the module in modules_to_save" in refused(other)[key]
    (module,) = [m for m in lower(other, modules_to_save=["gate_proj"]).modules if m.module == GATE]
    assert module.primitives == ("replaced weight",)
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        for end in (".weight", ".base_layer.weight", ".original_module.weight"):
            copy = {f"{PREFIX}{QUERY}{end}": WEIGHTS[QUERY].to(dtype)}
            assert len(lower(pair(QUERY) | copy).modules) == 1
    found = refused(pair(QUERY), modules_to_save=["gate_proj"])
    assert found == {GATE: "is named by modules_to_save, but has no tensors"}
    found = refused(pair(QUERY) | {key: torch.ones(8, 12)}, modules_to_save=["gate_proj"])
    assert found == {key: "has shape [8, 12], expected [12, 8]"}
    found = refused(pair(QUERY), modules_to_save=["experts"])
    reason = "is named by modules_to_save; experts cannot be replaced"
    assert found == {UP: reason, DOWN: reason}
    stray = {f"{PREFIX}score.weight": torch.ones(2)}
    assert refused(pair(QUERY) | stray) == {"score": "the base org/base has no such module"}
    unknown = BaseSpec("b", "b", "llama", base().modules, BIASES)
    copy = {f"{PREFIX}{QUERY}.base_layer.weight": WEIGHTS[QUERY]}
    reason = "a copy of it needs the base's weight, which is not available"
    assert refused(pair(QUERY) | copy, spec=unknown) == {QUERY: reason}


def test_modules_that_are_replaced_are_no_targets() -> None:
    saved = {f"{PREFIX}{GATE}.weight": torch.ones(12, 8)}
    fields: dict[str, Any] = {"target_modules": ["q_proj", "gate_proj"]}
    assert len(lower(pair(QUERY) | saved, modules_to_save=["gate_proj"], **fields).modules) == 2
    found = refused(
        pair(QUERY) | saved | pair(GATE, out=12), modules_to_save=["gate_proj"], **fields
    )
    assert found[GATE] in (
        "has tensors, but target_modules does not name it",
        "is named by modules_to_save, and is adapted as well",
    )
    assert "not a valid pattern" in refused(pair(QUERY), modules_to_save=["("])["modules_to_save"]


def test_norms_are_replaced_with_their_bias() -> None:
    weight = {f"{PREFIX}{NORM}.weight": torch.ones(8)}
    found = refused(pair(QUERY) | weight, modules_to_save=["norm"])
    assert found == {f"{NORM}.bias": "is missing, but its weight is present"}
    both = weight | {f"{PREFIX}{NORM}.bias": torch.ones(8)}
    made = lower(pair(QUERY) | both, modules_to_save=["norm"]).modules[0]
    assert made.bias is not None
    assert made.bias.tolist() == [0.75] * 8
    again = {f"{PREFIX}{NORM}.modules_to_save.bias": torch.ones(8)}
    assert len(lower(pair(QUERY) | both | again, modules_to_save=["norm"]).modules) == 2
    again = {f"{PREFIX}{NORM}.modules_to_save.bias": torch.zeros(8)}
    found = refused(pair(QUERY) | both | again, modules_to_save=["norm"])
    assert found == {f"{PREFIX}{NORM}.bias": "is given twice"}
    copied = {f"{PREFIX}{NORM}.original_module.bias": torch.zeros(8)}
    found = refused(pair(QUERY) | copied)
    assert found == {f"{PREFIX}{NORM}.original_module.bias": "differs from the base's bias"}
    gate = {f"{PREFIX}{GATE}.weight": torch.ones(12, 8), f"{PREFIX}{GATE}.bias": torch.ones(12)}
    found = refused(pair(QUERY) | gate, modules_to_save=["gate_proj"])
    assert found == {f"{GATE}.bias": f"the base's {GATE} has no bias"}


def test_trained_tokens() -> None:
    key = f"{PREFIX}{TABLE}.token_adapter.trainable_tokens_delta"
    fields: dict[str, Any] = {"trainable_token_indices": [4, 1]}
    made = lower(pair(QUERY) | {key: torch.stack([torch.ones(8), torch.zeros(8)])}, **fields)
    (module,) = [m for m in made.modules if m.module == TABLE]
    assert module.rows is not None
    assert module.rows.ids == (1, 4)
    assert module.rows.weight[:, 0].tolist() == [0, 1]
    assert refused(pair(QUERY), **fields) == {TABLE: "its trained tokens are missing"}
    assert refused(pair(QUERY) | rows(TABLE)) == {key: "has tokens that the config does not name"}
    found = refused(pair(QUERY) | rows(TABLE, 3), **fields)
    assert found == {key: "has shape [3, 8], expected [2, 8]"}
    found = refused(pair(QUERY) | rows(TABLE), trainable_token_indices=[1, 1])
    assert found == {key: "has a repeated token"}
    adapted = pair(QUERY) | rows(TABLE) | table()
    found = refused(adapted, target_modules=["q_proj", TABLE], **fields)
    assert found == {TABLE: "has trained tokens, and is adapted or replaced as well"}


@pytest.mark.parametrize(
    ("tokens", "where", "reason"),
    [
        ([1, 20], "trainable_token_indices embed_tokens", "has token 20"),
        ("x", "trainable_token_indices embed_tokens", "must be a list of token ids"),
        ({TABLE: [-1]}, "trainable_token_indices embed_tokens", "must be a list of token ids"),
        ({TABLE: 1}, "trainable_token_indices embed_tokens", "must be a list of token ids"),
        ({"nowhere": [1]}, "trainable_token_indices nowhere", "has no such module"),
        ({"gate_proj": [1]}, GATE, "has no token rows"),
        ({NORM: [1]}, NORM, "has no token rows"),
    ],
)
def test_tokens_that_are_none(tokens: Any, where: str, reason: str) -> None:
    assert reason in refused(pair(QUERY) | rows(TABLE), trainable_token_indices=tokens)[where]


def test_tied_tokens() -> None:
    weights = pair(QUERY) | rows(TABLE)
    made = lower(weights, trainable_token_indices=[3, 5], spec=base(tied=True))
    assert {m.module for m in made.modules if m.rows is not None} == {TABLE, HEAD}
    twin = rows(HEAD)
    assert lower(weights | twin, trainable_token_indices=[3, 5], spec=base(tied=True)).modules
    other = {key: tensor * 2 for key, tensor in twin.items()}
    found = refused(weights | other, trainable_token_indices=[3, 5], spec=base(tied=True))
    assert found == dict.fromkeys(twin, "has tokens that the config does not name")
    found = refused(
        weights | twin,
        trainable_token_indices={TABLE: [3, 5], HEAD: [3, 6]},
        ensure_weight_tying=True,
        spec=base(tied=True),
    )
    assert (
        found["ensure_weight_tying"]
        == "needs the same tokens for the embedding and the output layer"
    )
    biased = base(tied=True)
    head = BaseModule(HEAD, "linear", 8, 20, has_bias=True, is_head=True)
    biased = BaseSpec(
        "b", "b", "llama", {**biased.modules, HEAD: head}, tied=True, weight=biased.weight
    )
    found = refused(weights, trainable_token_indices=[3, 5], spec=biased)
    assert found == {HEAD: "has a bias, which PEFT omits with trainable tokens"}


def test_tied_pairs_and_weights() -> None:
    fields: dict[str, Any] = {
        "target_modules": [TABLE],
        "ensure_weight_tying": True,
        "spec": base(tied=True),
    }
    made = lower(table(), **fields)
    assert [m.module for m in made.modules] == [TABLE, HEAD]
    other = pair(HEAD, out=20)
    found = refused(table() | other, **fields)
    assert found == dict.fromkeys(
        other, "differs from the embedding's, despite ensure_weight_tying"
    )
    magnitude = {f"{PREFIX}{TABLE}.lora_magnitude_vector": torch.ones(8)}
    found = refused(table() | magnitude, use_dora=True, **fields)
    assert found == {"use_dora": "cannot be combined with ensure_weight_tying"}

    fields |= {"target_modules": ["q_proj"], "modules_to_save": [TABLE]}
    whole = pair(QUERY) | {f"{PREFIX}{TABLE}.weight": torch.ones(20, 8)}
    made = lower(whole, **fields)
    assert {m.module for m in made.modules if m.weight is not None} == {TABLE, HEAD}
    key = f"{PREFIX}{HEAD}.weight"
    found = refused(whole | {key: torch.zeros(20, 8)}, **fields)
    assert found == {key: "differs from the embedding's, despite ensure_weight_tying"}


def trained(weights: Mapping[str, Tensor], /, **fields: Any) -> AdapterProgram:
    settings = {"peft_type": "TRAINABLE_TOKENS", "token_indices": [3, 1]} | fields
    return formats.lower(Checkpoint(settings, dict(weights)), base(), LIMITS)


def delta(module: str, count: int = 2) -> dict[str, Tensor]:
    return {f"{PREFIX}{module}.trainable_tokens_delta": torch.ones(count, 8)}


@pytest.mark.parametrize(
    ("weights", "fields", "where", "reason"),
    [
        (delta(TABLE), {"token_indices": None}, "token_indices", "must be a list of token ids"),
        (delta(TABLE), {"token_indices": [1, 99]}, "token_indices", "has token 99"),
        (delta(TABLE), {"novel": 1}, "novel", "not a known field of trainable tokens"),
        (delta(TABLE), {"target_modules": 3}, "target_modules", "string or a list of strings"),
        (delta(TABLE), {"target_modules": ["wte"]}, "target_modules", "matches no module"),
        (delta(TABLE), {"target_modules": ["q_proj"]}, QUERY, "has no token rows"),
        (delta(TABLE), {"target_modules": [HEAD]}, HEAD, "its trained tokens are missing"),
        (delta(TABLE, 3), {}, f"{PREFIX}{TABLE}.trainable_tokens_delta", "expected [2, 8]"),
        ({"x": torch.ones(1)}, {}, "x", "does not begin with"),
        (
            {f"{PREFIX}x": torch.ones(1)},
            {},
            f"{PREFIX}x",
            "is not a known tensor of trainable tokens",
        ),
    ],
)
def test_trainable_tokens_by_themselves(
    weights: dict[str, Tensor], fields: dict[str, Any], where: str, reason: str
) -> None:
    with pytest.raises(AdapterInvalid) as caught:
        trained(weights, **fields)
    assert reason in {r.where: r.reason for r in caught.value.refusals}[where]
    assert trained(delta(TABLE), init_weights=True).modules[0].rows is not None
    copy = {f"{PREFIX}{TABLE}.base_layer.weight": WEIGHTS[TABLE]}
    assert len(trained(delta(TABLE) | copy).modules) == 1


def test_trainable_tokens_with_a_copy_of_another_base() -> None:
    key = f"{PREFIX}{TABLE}.base_layer.weight"
    made = trained(delta(TABLE) | {key: WEIGHTS[TABLE] + 1})
    (module,) = made.modules
    assert module.weight is not None
    assert torch.equal(module.weight[[0, 2]], WEIGHTS[TABLE][[0, 2]] + 1)
    assert torch.equal(module.weight[[1, 3]], torch.ones(2, 8))
    assert "differs from the base" in made.warnings[0]
    twice = {f"{PREFIX}{TABLE}.trainable_tokens_delta.default": torch.ones(2, 8)}
    with pytest.raises(AdapterInvalid, match="is given twice"):
        trained(delta(TABLE) | twice)
