"""What each family refuses, and by what name; what it lowers to is held against PEFT elsewhere."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import VeraConfig, get_peft_model
from safetensors.torch import save
from torch import Tensor, nn

from adaplex.adapters import formats
from adaplex.adapters.base_spec import BaseModule, BaseSpec
from adaplex.adapters.checkpoint import CONFIG, WEIGHTS, Checkpoint, read_checkpoint
from adaplex.adapters.errors import AdapterInvalid, AdapterTooLarge
from adaplex.adapters.formats.vera import random_projections
from adaplex.adapters.limits import AdapterLimits
from adaplex.adapters.program import AdapterProgram
from adapters.handmade import DOWN, HIDDEN, INNER, NORM, PREFIX, QUERY, VALUE, make_base, write

LIMITS = AdapterLimits()
EMBEDDING, BLOCK = "model.embed_tokens", "model.layers.0.self_attn"
HEADS, FEATURES = 2, 3


def base_of(layers: int = 1) -> BaseSpec:
    """One layer, with the embedding and the attention."""
    plain = make_base(layers=layers)
    more = [BaseModule(EMBEDDING, "embedding", 24, HIDDEN)] + [
        BaseModule(
            f"model.layers.{i}.self_attn", "block", HIDDEN, HIDDEN, layer=i, part="attention"
        )
        for i in range(layers)
    ]
    modules = {**plain.modules, **{module.name: module for module in more}}
    return replace(plain, modules=modules, kv_shapes=((HEADS, FEATURES, FEATURES),) * layers)


BASE = base_of()
Weights = dict[str, Tensor]


def at(module: str, **roles: Tensor) -> Weights:
    """Tensors of one module under PEFT's keys."""
    return {f"{PREFIX}{module}.{role}": tensor for role, tensor in roles.items()}


def ones(*shape: int) -> Tensor:
    return torch.ones(shape)


def _loha(out: int, inputs: int, rank: int = 2) -> Weights:
    a, b = ones(out, rank), ones(rank, inputs)
    return {"hada_w1_a": a, "hada_w1_b": b, "hada_w2_a": a, "hada_w2_b": b}


VIRTUAL: dict[str, Any] = {"num_virtual_tokens": 3, "num_transformer_submodules": 1}
MADE: Mapping[str, tuple[dict[str, Any], Weights]] = {
    "ADALORA": (
        {"init_r": 2, "lora_alpha": 4, "target_modules": ["q_proj"]},
        at(QUERY, lora_A=ones(2, HIDDEN), lora_B=ones(HIDDEN, 2), lora_E=ones(2, 1)),
    ),
    "VERA": (
        {"r": 2, "target_modules": ["q_proj", "down_proj"]},
        {"base_model.vera_A": ones(2, INNER), "base_model.vera_B": ones(HIDDEN, 2)}
        | at(QUERY, vera_lambda_b=ones(HIDDEN), vera_lambda_d=ones(2))
        | at(DOWN, vera_lambda_b=ones(HIDDEN), vera_lambda_d=ones(2)),
    ),
    "LOHA": (
        {"r": 2, "alpha": 4, "target_modules": ["v_proj"]},
        at(VALUE, **_loha(HIDDEN // 2, HIDDEN)),
    ),
    "LOKR": (
        {"r": 1, "alpha": 4, "target_modules": ["q_proj"]},
        at(QUERY, lokr_w1=ones(2, 2), lokr_w2_a=ones(4, 1), lokr_w2_b=ones(1, 4)),
    ),
    "IA3": (
        {"target_modules": ["q_proj", "down_proj"], "feedforward_modules": ["down_proj"]},
        at(QUERY, ia3_l=ones(HIDDEN, 1)) | at(DOWN, ia3_l=ones(1, INNER)),
    ),
    "LN_TUNING": (
        {"target_modules": ["norm"]},
        at(
            NORM,
            **{"ln_tuning_layers.weight": ones(HIDDEN), "ln_tuning_layers.bias": ones(HIDDEN)},
        ),
    ),
    "BITFIT": ({}, at(QUERY, bias=ones(HIDDEN)) | at(VALUE, bias=ones(HIDDEN // 2))),
    "BEFT": ({"target_modules": ["v_proj"]}, at(VALUE, beft_bias=ones(1, HIDDEN // 2))),
    "PROMPT_TUNING": (VIRTUAL, {"prompt_embeddings": ones(3, HIDDEN)}),
    "P_TUNING": (VIRTUAL, {"prompt_embeddings": ones(3, HIDDEN)}),
    "CPT": (VIRTUAL | {"cpt_token_ids": [1, 2, 3]}, {"prompt_embeddings": ones(3, HIDDEN)}),
    "MULTITASK_PROMPT_TUNING": (
        VIRTUAL | {"num_tasks": 2, "num_ranks": 1, "task_id": 1},
        {
            "prompt_embeddings": ones(3, HIDDEN),
            "prefix_task_cols": ones(2, 3, 1),
            "prefix_task_rows": torch.tensor([2.0, 3.0])[:, None, None].expand(2, 1, HIDDEN),
        },
    ),
    "CARTRIDGE": (
        VIRTUAL | {"num_frozen_tokens": 1},
        {"prompt_embeddings": ones(3, 2 * HEADS * FEATURES)},
    ),
    "PREFIX_TUNING": (VIRTUAL, {"prompt_embeddings": ones(3, 2 * HEADS * FEATURES)}),
}


def lower(
    kind: str,
    weights: Mapping[str, Tensor | None] | None = None,
    /,
    *,
    base: BaseSpec = BASE,
    limits: AdapterLimits = LIMITS,
    **fields: Any,
) -> AdapterProgram:
    """Lowers the family's small adapter with fields and tensors changed; None takes one away."""
    config, tensors = MADE[kind]
    changed: dict[str, Tensor | None] = {**tensors, **(weights or {})}
    kept = {key: tensor for key, tensor in changed.items() if tensor is not None}
    return formats.lower(Checkpoint({"peft_type": kind, **config, **fields}, kept), base, limits)


def refusals(kind: str, *args: Any, **fields: Any) -> dict[str, str]:
    """Where -> why."""
    with pytest.raises(AdapterInvalid) as caught:
        lower(kind, *args, **fields)
    return {refusal.where: refusal.reason for refusal in caught.value.refusals}


@pytest.mark.parametrize("kind", MADE)
def test_each_small_adapter_is_lowered(kind: str) -> None:
    program = lower(kind)
    assert program.family == formats.FORMATS[kind].family
    assert program.modules
    assert [m.module for m in program.modules] == sorted(m.module for m in program.modules)
    assert kind not in formats.NEEDS


@pytest.mark.parametrize("kind", MADE)
def test_what_is_not_known_is_refused_by_name(kind: str) -> None:
    assert refusals(kind, never_heard_of=1).keys() == {"never_heard_of"}
    found = refusals(kind, {f"{PREFIX}{QUERY}.stray": ones(2)})
    assert found.keys() == {f"{PREFIX}{QUERY}.stray"}
    assert "is not a tensor of" in found[f"{PREFIX}{QUERY}.stray"]


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


def test_adalora_divides_by_the_initial_rank_also_when_some_are_pruned() -> None:
    whole = lower("ADALORA")
    (module,) = whole.modules
    assert module.scale == pytest.approx(4 / (2 + 1e-5))
    pruned = at(QUERY, lora_A=ones(1, HIDDEN), lora_B=ones(HIDDEN, 1), lora_E=ones(1, 1))
    for key in (f"{QUERY}.lora_E", f"{QUERY}.lora_E.default"):
        (module,) = lower("ADALORA", pruned, rank_pattern={key: [False, True]}).modules
        assert module.scale == pytest.approx(4 / (2 + 1e-5))
        assert module.low_rank is not None
        assert module.low_rank.rank == 1
    nothing = at(QUERY, lora_A=ones(0, HIDDEN), lora_B=ones(HIDDEN, 0), lora_E=ones(0, 1))
    found = refusals("ADALORA", nothing, rank_pattern={f"{QUERY}.lora_E": [False, False]})
    assert found == {"rank_pattern": "leaves no rank of any module: nothing would change"}


@pytest.mark.parametrize("scale", ["bias", "base_layer.bias"])
def test_trained_biases_need_permission_and_a_place(scale: str) -> None:
    bias = at(QUERY, **{scale: ones(HIDDEN)})
    for kind, only in (("ADALORA", "lora_only"), ("VERA", "vera_only")):
        assert refusals(kind, bias) == {f"{QUERY}.bias": "is there, but bias is 'none'"}
        (module,) = [m for m in lower(kind, bias, bias=only).modules if m.module == QUERY]
        assert module.bias is not None
        torch.testing.assert_close(module.bias, ones(HIDDEN) - BASE.biases[QUERY])
        norm = at(NORM, bias=ones(HIDDEN))
        assert refusals(kind, norm, bias=only).keys() == {f"{NORM}.bias"}
        assert NORM in {m.module for m in lower(kind, norm, bias="all").modules}
        assert refusals(kind, at(VALUE, bias=ones(4)), bias="all").keys() == {f"{VALUE}.bias"}
        assert "nowhere" in refusals(kind, at("nowhere", bias=ones(4)), bias="all")


@pytest.mark.parametrize(("rank", "wide", "tall"), [(2, 16, 8), (7, 33, 65)])
def test_vera_draws_what_peft_draws(rank: int, wide: int, tall: int) -> None:
    model = nn.Sequential(nn.Linear(wide, tall))
    config = VeraConfig(r=rank, target_modules=["0"], projection_prng_key=5)
    tuned: Any = get_peft_model(model, config)
    a, b = random_projections(5, rank, wide, tall)
    assert torch.equal(a, tuned.base_model.vera_A["default"])
    assert torch.equal(b, tuned.base_model.vera_B["default"])


def test_vera_without_its_projections_says_what_to_save() -> None:
    missing = {"base_model.vera_A": None}
    assert "save_projection is true" in refusals("VERA", missing)["base_model.vera_A"]
    program = lower("VERA", save_projection=False)
    assert "not read" in program.notes[0]
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
    assert "make a weight of [12, 8]" in refusals("LOKR", {key: ones(3, 2)})[key]
    assert "whole and decomposed" in refusals("LOKR", {f"{key}_a": ones(2, 1)})[key]
    assert f"{key[:-1]}2" in refusals("LOKR", {f"{key[:-1]}2_a": None})


@pytest.mark.parametrize(("r", "rank"), [(1, 1), (2, 4), (3, 8), (8, 8)])
def test_loha_takes_the_smaller_of_its_exact_pairs(r: int, rank: int) -> None:
    weights = at(QUERY, **_loha(HIDDEN, HIDDEN, r)) | dict.fromkeys(MADE["LOHA"][1])
    (module,) = lower("LOHA", weights, r=r, target_modules=["q_proj"]).modules
    assert module.low_rank is not None
    assert module.low_rank.rank == rank


def test_ia3_takes_ends_of_names_for_feedforward_as_peft_does() -> None:
    by_module = {m.module: m for m in lower("IA3").modules}
    assert by_module[DOWN].input_scale is not None
    assert by_module[QUERY].output_scale is not None
    for ends in (["wn_proj"], r".*\.mlp\..*"):
        same = {m.module: m for m in lower("IA3", feedforward_modules=ends).modules}
        assert same[DOWN].input_scale is not None
        assert same[QUERY].output_scale is not None


def test_multitask_serves_the_task_that_is_named() -> None:
    for task, factor in ((0, 2.0), (1, 3.0)):
        (module,) = lower("MULTITASK_PROMPT_TUNING", task_id=task).modules
        assert module.virtual is not None
        assert torch.equal(module.virtual, torch.full((3, HIDDEN), factor))
    digests = {lower("MULTITASK_PROMPT_TUNING", task_id=task).digest for task in (0, 1)}
    assert len(digests) == 2


def test_a_prefix_is_cut_by_layer_then_keys_and_values() -> None:
    base, size = base_of(2), HEADS * FEATURES
    saved = torch.arange(3.0 * 4 * size).view(3, 4 * size)
    program = lower("PREFIX_TUNING", {"prompt_embeddings": saved}, base=base)
    assert program.prefix_tokens == program.leading == 3
    for layer, module in enumerate(program.modules):
        assert module.module == f"model.layers.{layer}.self_attn"
        assert module.prefix is not None
        cut = saved.view(3, 4, HEADS, FEATURES)
        assert torch.equal(module.prefix.keys, cut[:, 2 * layer])
        assert torch.equal(module.prefix.values, cut[:, 2 * layer + 1])


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


def test_pruned_tensors_can_be_read_and_have_a_digest(tmp_path: Path) -> None:
    config, weights = MADE["ADALORA"]
    key = f"{PREFIX}{QUERY}.lora_E"
    contents = {
        CONFIG: json.dumps({"peft_type": "ADALORA", **config}).encode(),
        WEIGHTS: save({**weights, key: ones(0, 1)}),
    }
    read = read_checkpoint(write(tmp_path / "pruned", contents), LIMITS)
    assert read.tensors[key].shape == (0, 1)
    with pytest.raises(AdapterInvalid, match=r"has shape \[0, 1\]"):
        formats.lower(read, BASE, LIMITS)


@pytest.mark.parametrize("kind", ["ADALORA", "VERA", "LOHA", "LOKR", "IA3", "BEFT"])
def test_keys_of_a_training_checkpoint_are_accepted(kind: str) -> None:
    weights = MADE[kind][1]
    renamed = {f"{key}.default": tensor for key, tensor in weights.items()}
    changed = lower(kind, {**dict.fromkeys(weights), **renamed})
    assert [m.module for m in changed.modules] == [m.module for m in lower(kind).modules]
    assert set(refusals(kind, renamed).values()) == {"is given twice"}


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
