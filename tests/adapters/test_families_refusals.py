"""What each family refuses, and by what name."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from adaplex.adapters import formats
from adaplex.adapters.errors import AdapterInvalid, AdapterTooLarge
from adaplex.adapters.formats.peft.vera import random_projections
from adaplex.adapters.limits import AdapterLimits
from adaplex.adapters.program.base_spec import BaseSpec
from adapters.handmade import HIDDEN, INNER, NORM, PREFIX, QUERY, VALUE, make_base
from adapters.small_families import BASE, LIMITS, MADE, at, base_of, lower, ones, refusals


@pytest.mark.parametrize("kind", MADE)
def test_what_is_not_known_is_refused_by_name(kind: str) -> None:
    assert refusals(kind, never_heard_of=1).keys() == {"never_heard_of"}
    found = refusals(kind, {f"{PREFIX}{QUERY}.stray": ones(2)})
    assert found.keys() == {f"{PREFIX}{QUERY}.stray"}
    assert "is not a known tensor of" in found[f"{PREFIX}{QUERY}.stray"]


@pytest.mark.parametrize("kind", MADE)
def test_a_missing_or_misshapen_tensor_is_named(kind: str) -> None:
    for key in MADE[kind][1]:
        assert key in refusals(kind, {key: ones(5, 7, 3)})
        if kind not in ("BITFIT", "LN_TUNING"):  # any part of what they change may be left out
            found = refusals(kind, {key: None})
            assert any(where in key for where in found), found


@pytest.mark.parametrize("kind", [k for k in MADE if "target_modules" in MADE[k][0]])
def test_targets_and_tensors_must_name_the_same_modules(kind: str) -> None:
    assert "target_modules" in refusals(kind, target_modules=None)
    assert "target_modules" in refusals(kind, target_modules=3)
    assert "target_modules" in refusals(kind, target_modules=["nowhere"])
    assert "target_modules" in refusals(kind, target_modules="(")
    found = refusals(kind, target_modules=[*MADE[kind][0]["target_modules"], "lm_head"])
    assert found == {"lm_head": "is named by target_modules, but has no tensors"}


BAD_FIELDS: list[tuple[str, str, Any]] = [
    ("ADALORA", "init_r", 0),
    ("ADALORA", "init_r", "2"),
    ("ADALORA", "lora_alpha", "4"),
    ("ADALORA", "rank_pattern", [True]),
    ("ADALORA", "rank_pattern", {f"{QUERY}.lora_E": [1, 0]}),
    ("ADALORA", "rank_pattern", {f"{QUERY}.lora_E": [True, True, False]}),
    ("ADALORA", "bias", "some"),
    ("ADALORA", "use_dora", True),
    ("VERA", "r", 0),
    ("VERA", "projection_prng_key", "7"),
    ("VERA", "projection_prng_key", 1 << 70),
    ("VERA", "save_projection", "no"),
    ("VERA", "bias", "lora_only"),
    ("VERA", "exclude_modules", ["q_proj"]),
    ("LOHA", "r", 1.5),
    ("LOHA", "alpha", None),
    ("LOHA", "rank_pattern", {"v_proj": 0}),
    ("LOKR", "alpha_pattern", {"q_proj": "x"}),
    ("IA3", "feedforward_modules", None),
    ("IA3", "feedforward_modules", 3),
    ("IA3", "feedforward_modules", "("),
    ("IA3", "layers_to_transform", [0]),
    ("PROMPT_TUNING", "num_virtual_tokens", "3"),
    ("PROMPT_TUNING", "token_dim", HIDDEN + 1),
    ("PROMPT_TUNING", "num_transformer_submodules", 2),
    ("MULTITASK_PROMPT_TUNING", "task_id", None),
    ("MULTITASK_PROMPT_TUNING", "task_id", 2),
    ("MULTITASK_PROMPT_TUNING", "task_id", True),
    ("MULTITASK_PROMPT_TUNING", "num_tasks", 0),
    ("MULTITASK_PROMPT_TUNING", "num_ranks", "1"),
    ("PREFIX_TUNING", "num_layers", 2),
    ("PREFIX_TUNING", "token_dim", HIDDEN),
    ("PREFIX_TUNING", "num_attention_heads", 4),
]


@pytest.mark.parametrize(("kind", "field", "value"), BAD_FIELDS)
def test_a_bad_field_is_named(kind: str, field: str, value: Any) -> None:
    assert field in refusals(kind, **{field: value})


@pytest.mark.parametrize(
    ("kind", "fields", "limits", "field"),
    [
        ("ADALORA", {}, AdapterLimits(max_rank=1), "init_r"),
        ("VERA", {}, AdapterLimits(max_rank=1), "r"),
        ("LOHA", {}, AdapterLimits(max_rank=1), "r"),
        ("LOKR", {"r": 300}, LIMITS, "r"),
        ("VERA", {}, AdapterLimits(max_adapter_bytes=100), "r"),
        ("LOHA", {}, AdapterLimits(max_adapter_bytes=90), "r"),
        ("LOKR", {}, AdapterLimits(max_adapter_bytes=60), "r"),
        ("PROMPT_TUNING", {}, AdapterLimits(max_virtual_tokens=2), "num_virtual_tokens"),
        ("PREFIX_TUNING", {}, AdapterLimits(max_virtual_tokens=2), "num_virtual_tokens"),
    ],
)
def test_limits_are_named(
    kind: str, fields: dict[str, Any], limits: AdapterLimits, field: str
) -> None:
    with pytest.raises(AdapterTooLarge, match="limit") as caught:
        lower(kind, limits=limits, **fields)
    assert caught.value.field == field
    if not fields:
        assert lower(kind, limits=limits.for_stored()).modules


@pytest.mark.parametrize("scale", ["bias", "base_layer.bias"])
def test_trained_biases_need_permission_and_a_place(scale: str) -> None:
    bias = at(QUERY, **{scale: ones(HIDDEN)})
    for kind, only in (("ADALORA", "lora_only"), ("VERA", "vera_only")):
        assert refusals(kind, bias) == {f"{QUERY}.bias": "is present, but bias is 'none'"}
        (module,) = [m for m in lower(kind, bias, bias=only).modules if m.module == QUERY]
        assert module.bias is not None
        torch.testing.assert_close(module.bias, ones(HIDDEN) - BASE.biases[QUERY])
        norm = at(NORM, bias=ones(HIDDEN))
        assert refusals(kind, norm, bias=only).keys() == {f"{NORM}.bias"}
        assert NORM in {m.module for m in lower(kind, norm, bias="all").modules}
        assert refusals(kind, at(VALUE, bias=ones(4)), bias="all").keys() == {f"{VALUE}.bias"}
        assert "nowhere" in refusals(kind, at("nowhere", bias=ones(4)), bias="all")


def test_vera_without_its_projections_says_what_to_save() -> None:
    missing = {"base_model.vera_A": None}
    assert "save_projection is true" in refusals("VERA", missing)["base_model.vera_A"]
    program = lower("VERA", save_projection=False)
    assert "vera_A and vera_B are ignored" in program.notes[0]
    a, _ = random_projections(0, 2, INNER, HIDDEN)
    (module,) = [m for m in program.modules if m.module == QUERY]
    assert module.low_rank is not None
    assert torch.equal(module.low_rank.a, a[:, :HIDDEN])


@pytest.mark.parametrize("kind", ["LOHA", "LOKR", "BEFT"])
def test_what_peft_has_for_linears_alone_refuses_a_conv1d(kind: str) -> None:
    modules = {name: replace(module, transposed=True) for name, module in BASE.modules.items()}
    found = refusals(kind, base=replace(BASE, modules=modules))
    assert all("is a Conv1D" in reason for reason in found.values())


@pytest.mark.parametrize(
    ("kind", "key"), [("LOHA", f"{VALUE}.hada_t1"), ("LOKR", f"{QUERY}.lokr_t2")]
)
def test_convolutions_are_refused_by_name(kind: str, key: str) -> None:
    assert "convolution" in refusals(kind, {PREFIX + key: ones(2, 2, 1, 1)})[PREFIX + key]


def test_lokr_factors_must_make_the_weight() -> None:
    key = f"{PREFIX}{QUERY}.lokr_w1"
    assert "form a weight of shape [12, 8]" in refusals("LOKR", {key: ones(3, 2)})[key]
    assert "whole and decomposed" in refusals("LOKR", {f"{key}_a": ones(2, 1)})[key]
    assert f"{key[:-1]}2" in refusals("LOKR", {f"{key[:-1]}2_a": None})


@pytest.mark.parametrize(
    ("kind", "base"),
    [
        ("PROMPT_TUNING", make_base()),
        ("PREFIX_TUNING", make_base()),
        ("PREFIX_TUNING", replace(base_of(2), kv_shapes=((2, 3, 3), (1, 6, 6)))),
        ("PREFIX_TUNING", replace(BASE, kv_shapes=((2, 3, 4),))),
        ("PREFIX_TUNING", replace(BASE, kv_shapes=((2, 3, 3),) * 2)),
    ],
)
def test_a_base_without_a_place_for_it_is_refused(kind: str, base: BaseSpec) -> None:
    assert "needs" in refusals(kind, base=base)["peft_type"]


NASTY: list[Any] = [
    None, True, False, 0, -1, 3, 1.5, 1e30, "", "x", "(", [], [1], ["x"], [[True]], [None], {},
    {"q_proj": 1}, {"x": [True]}, {"(": 2}, {"x": None},
]  # fmt: skip


@pytest.mark.parametrize("kind", MADE)
def test_no_config_and_no_shape_makes_anything_but_refusals(kind: str) -> None:
    config, weights = MADE[kind]
    fields = {*config, *formats.FORMATS[kind].semantic_fields, "modules_to_save", "bias"}
    changes: list[tuple[dict[str, Tensor | None], dict[str, Any]]] = [
        ({}, {name: value}) for name in fields - {"peft_type"} for value in NASTY
    ]
    shapes = [(), (0,), (1,), (0, 0), (0, HIDDEN), (HIDDEN, 0), (1, 1), (2, 2, 2), (1, 1, 1, 1)]
    changes += [({key: torch.ones(shape)}, {}) for key in weights for shape in shapes]
    for tensors, changed in changes:
        try:
            program = lower(kind, tensors, **changed)
        except (AdapterInvalid, AdapterTooLarge):
            continue
        assert program.modules
