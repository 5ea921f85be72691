from __future__ import annotations

import math
import time
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor

from adaplex.adapters import formats
from adaplex.adapters.errors import AdapterInvalid, AdapterTooLarge
from adaplex.adapters.formats.lora import UNSUPPORTED
from adaplex.adapters.limits import AdapterLimits
from adaplex.adapters.program import AdapterProgram
from adapters.handmade import (
    BASE,
    DOWN,
    HEAD,
    HIDDEN,
    NORM,
    PREFIX,
    QUERY,
    VALUE,
    checkpoint,
    pair,
    tensors,
)

LIMITS = AdapterLimits()
A_QUERY, B_QUERY = f"{PREFIX}{QUERY}.lora_A.weight", f"{PREFIX}{QUERY}.lora_B.weight"


def lower(weights: Mapping[str, Tensor] | None = None, /, **fields: Any) -> AdapterProgram:
    return formats.lower(checkpoint(weights, **fields), BASE, LIMITS)


def refusals(weights: Mapping[str, Tensor] | None = None, /, **fields: Any) -> dict[str, str]:
    """Where -> why."""
    with pytest.raises(AdapterInvalid) as caught:
        lower(weights, **fields)
    assert caught.value.field == caught.value.refusals[0].where
    for refusal in caught.value.refusals:
        assert refusal.where
        assert refusal.reason
        assert str(refusal) in str(caught.value)
    return {refusal.where: refusal.reason for refusal in caught.value.refusals}


def without(*keys: str) -> dict[str, Tensor]:
    return {key: tensor for key, tensor in tensors().items() if key not in keys}


def test_a_plain_adapter_lowers_to_its_pairs() -> None:
    program = lower()
    assert program.family == "lora"
    assert program.max_rank == 2
    assert [module.module for module in program.modules] == sorted(
        name for name in BASE.modules if name.endswith(("q_proj", "v_proj"))
    )
    for module in program.modules:
        assert module.low_rank is not None
        assert module.bias is None
        weights = pair(module.module)
        assert torch.equal(module.low_rank.a, weights[f"{PREFIX}{module.module}.lora_A.weight"])
        b = weights[f"{PREFIX}{module.module}.lora_B.weight"]
        torch.testing.assert_close(module.low_rank.b, b * 2)


@pytest.mark.parametrize(
    ("fields", "scale"),
    [
        ({"lora_alpha": 4}, 2.0),
        ({"lora_alpha": 3}, 1.5),
        ({"lora_alpha": 0.5}, 0.25),
        ({"lora_alpha": 4, "use_rslora": True}, 4 / math.sqrt(2)),
        ({"alpha_pattern": {"v_proj": 8, "q_proj": 6, "self_attn.q_proj": 1}}, 3.0),
        ({"alpha_pattern": {r"layers\.0\..*": 10}}, 5.0),
        ({"alpha_pattern": {"proj": 10}}, 2.0),  # not a whole word
        ({"alpha_pattern": {"q_proj": 6}, "use_rslora": True}, 6 / math.sqrt(2)),
    ],
)
def test_the_scale_is_folded_into_b(fields: dict[str, Any], scale: float) -> None:
    (module,) = [m for m in lower(**fields).modules if m.module == QUERY]
    assert module.scale == pytest.approx(scale)
    assert module.low_rank is not None
    torch.testing.assert_close(module.low_rank.b, pair(QUERY)[B_QUERY] * scale)


def test_ranks_differ_by_pattern() -> None:
    weights = tensors("v_proj") | tensors("q_proj", rank=5)
    program = lower(weights, rank_pattern={"q_proj": 5})
    ranks = {m.module: m.low_rank.rank for m in program.modules if m.low_rank is not None}
    assert ranks[QUERY] == 5
    assert ranks[VALUE] == 2
    assert program.max_rank == 5
    scales = {m.module: m.scale for m in program.modules}
    assert scales[QUERY] == pytest.approx(4 / 5)


def test_keys_of_a_training_checkpoint_are_accepted() -> None:
    renamed = {key.replace(".weight", ".default.weight"): t for key, t in tensors().items()}
    assert [m.module for m in lower(renamed).modules] == [m.module for m in lower().modules]
    assert refusals(tensors() | renamed) == dict.fromkeys(renamed, "is given twice")


@pytest.mark.parametrize("half", ["A", "B"])
def test_a_missing_half_is_named(half: str) -> None:
    missing = f"{PREFIX}{QUERY}.lora_{half}.weight"
    assert refusals(without(missing)) == {missing: "half of a pair is missing"}


def test_wrong_shapes_say_what_was_expected_and_found() -> None:
    found = refusals(tensors() | {A_QUERY: torch.ones(2, 7), B_QUERY: torch.ones(9, 2)})
    assert found == {
        A_QUERY: f"has shape [2, 7], expected [2, {HIDDEN}]",
        B_QUERY: f"has shape [9, 2], expected [{HIDDEN}, 2]",
    }


def test_the_rank_of_the_tensors_must_be_the_configs() -> None:
    found = refusals(tensors(rank=3))
    assert len(found) == 8
    assert found[A_QUERY] == f"has shape [3, {HIDDEN}], expected [2, {HIDDEN}]"
    assert A_QUERY in refusals(tensors(), rank_pattern={"q_proj": 4})


@pytest.mark.parametrize("shape", [(), (2,), (2, HIDDEN, 1), (1, 2, HIDDEN)])
def test_only_matrices_are_pairs(shape: tuple[int, ...]) -> None:
    assert A_QUERY in refusals(tensors() | {A_QUERY: torch.ones(shape)})


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


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("r", None), ("r", 0), ("r", -1), ("r", "8"), ("r", True), ("r", 2.0), ("r", 10**400),
        ("lora_alpha", None), ("lora_alpha", 0), ("lora_alpha", -4), ("lora_alpha", "4"),
        ("lora_alpha", 10**400), ("lora_alpha", [4]), ("lora_alpha", False),
        ("use_rslora", "yes"), ("use_rslora", 1),
        ("rank_pattern", [1]), ("rank_pattern", {"q_proj": "2"}), ("rank_pattern", {"q": 0}),
        ("rank_pattern", {"q": 2.5}), ("alpha_pattern", {"q": None}), ("alpha_pattern", "q"),
        ("target_modules", None), ("target_modules", []), ("target_modules", 3),
        ("target_modules", [3]), ("target_modules", {"q_proj": 1}), ("target_modules", ""),
        ("exclude_modules", 3), ("exclude_modules", [None]), ("layers_pattern", {"a": 1}),
        ("layers_to_transform", "0"), ("layers_to_transform", ""), ("layers_to_transform", {}),
        ("layers_to_transform", 0.0), ("layers_to_transform", [-1]),
        ("layers_to_transform", [True]), ("layers_to_transform", [[0]]),
        ("layers_to_transform", False),
        ("bias", "some"), ("bias", None), ("bias", ["all"]), ("bias", True),
        ("init_lora_weights", "pissa"), ("init_lora_weights", "pissa_niter_4"),
        ("init_lora_weights", "olora"), ("init_lora_weights", "loftq"),
        ("init_lora_weights", "corda"), ("init_lora_weights", {}), ("init_lora_weights", []),
        ("never_heard_of", 1), ("never_heard_of", {"a": [1]}),
    ],
)  # fmt: skip
def test_a_bad_field_is_named(field: str, value: object) -> None:
    assert field in refusals(**{field: value})


@pytest.mark.parametrize("field", sorted(UNSUPPORTED))
def test_an_unsupported_field_is_refused_when_it_is_used(field: str) -> None:
    used: list[Any] = [True, "x", ["x"], {"x": 1}]
    for value in used:
        assert refusals(**{field: value}) == {field: UNSUPPORTED[field]}
    unused: list[Any] = [None, False, [], {}]
    for value in unused:
        assert lower(**{field: value}).digest == lower().digest


@pytest.mark.parametrize("value", [True, False, None, "gaussian", "orthogonal", "eva"])
def test_initialisers_that_leave_the_base_alone_are_accepted(value: object) -> None:
    assert lower(init_lora_weights=value).digest == lower().digest


@pytest.mark.parametrize(
    ("key", "reason"),
    [
        (f"{PREFIX}{QUERY}.lora_embedding_A", "does not fit a module of kind linear"),
        (f"{PREFIX}{QUERY}.lora_magnitude_vector", "use_dora is not set"),
        (f"{PREFIX}{QUERY}.lora_B.bias", "lora_bias is not set"),
        (f"{PREFIX}{HEAD}.modules_to_save.weight", r"expected \[24, 8\]"),
        (f"{PREFIX}{QUERY}.base_layer.weight", r"expected \[8, 8\]"),
        (f"{PREFIX}{QUERY}.base_layer.lora_A.weight", "not a tensor of LoRA"),
        (f"{PREFIX}{QUERY}.token_adapter.trainable_tokens_delta", "does not name"),
        (f"{PREFIX}{QUERY}.lora_C", "not a tensor of LoRA"),
        (f"{QUERY}.lora_A.weight", "does not begin with"),
        ("", "does not begin with"),
    ],
)
def test_every_tensor_is_accounted_for(key: str, reason: str) -> None:
    with pytest.raises(AdapterInvalid, match=reason) as caught:
        lower(tensors() | {key: torch.ones(2)})
    assert [refusal.where for refusal in caught.value.refusals] == [key]


def test_a_bias_becomes_its_difference_from_the_bases() -> None:
    trained = torch.arange(float(HIDDEN))
    for bias, name in (("lora_only", QUERY), ("all", QUERY), ("all", NORM)):
        program = lower(tensors() | {f"{PREFIX}{name}.bias": trained}, bias=bias)
        (module,) = [m for m in program.modules if m.module == name]
        assert module.bias is not None
        torch.testing.assert_close(module.bias, trained - BASE.biases[name])
        assert (module.low_rank is None) == (name == NORM)
    layered = lower(tensors() | {f"{PREFIX}{QUERY}.base_layer.bias": trained}, bias="all")
    assert any(module.bias is not None for module in layered.modules)


def test_a_bias_needs_permission_and_a_place() -> None:
    bias = {f"{PREFIX}{QUERY}.bias": torch.ones(HIDDEN)}
    assert refusals(tensors() | bias) == {f"{QUERY}.bias": "is there, but bias is 'none'"}
    norm = {f"{PREFIX}{NORM}.bias": torch.ones(HIDDEN)}
    found = refusals(tensors() | norm, bias="lora_only")
    assert found == {f"{NORM}.bias": "is there, but bias is 'lora_only'"}
    value = {f"{PREFIX}{VALUE}.bias": torch.ones(HIDDEN // 2)}
    found = refusals(tensors() | value, bias="all")
    assert found == {f"{VALUE}.bias": "the base has no bias there"}
    short = {f"{PREFIX}{QUERY}.bias": torch.ones(3)}
    found = refusals(tensors() | short, bias="all")
    assert found == {f"{QUERY}.bias": f"has shape [3], expected [{HIDDEN}]"}
    twice = bias | {f"{PREFIX}{QUERY}.base_layer.bias": torch.ones(HIDDEN)}
    assert list(refusals(tensors() | twice, bias="all").values()) == ["is given twice"]


def test_ranks_are_limited() -> None:
    with pytest.raises(AdapterTooLarge, match="rank 2, the limit is 1"):
        formats.lower(checkpoint(), BASE, AdapterLimits(max_rank=1))


@pytest.mark.parametrize("alpha", [1e38, 1e300])
def test_weights_that_overflow_once_scaled_are_refused(alpha: float) -> None:
    found = refusals({key: tensor * 1e3 for key, tensor in tensors().items()}, lora_alpha=alpha)
    assert found


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
        ("(", "is no pattern"),
        ("(?R)", "is no pattern"),
        (r"\L<names>", "is no pattern"),
        ("x{99999999999}", "is no pattern"),
        ("(" * 900 + ")" * 900, "is no pattern"),
        ("x" * 2001, "longer than 2000"),
        ("(?:(?:(?:x{999}){999}){999}){999}", "repeats too much"),
        ("(?:" * 60 + "a|b" + ")+" * 60, "repeats too much"),
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


def test_all_refusals_come_at_once() -> None:
    fields = refusals(r=0, lora_alpha="x", bias="some", use_bdlora=True, novel=1, target_modules=3)
    assert fields.keys() == {"r", "lora_alpha", "bias", "use_bdlora", "novel", "target_modules"}
    weights = without(A_QUERY) | {
        "stray": torch.ones(1),
        f"{PREFIX}{VALUE}.lora_A.weight": torch.ones(2, 3),
        f"{PREFIX}{QUERY}.bias": torch.ones(HIDDEN),
    }
    found = refusals(weights, use_bdlora=True)
    assert found.keys() == {
        "use_bdlora", "stray", A_QUERY, f"{PREFIX}{VALUE}.lora_A.weight", f"{QUERY}.bias",
    }  # fmt: skip
    assert refusals(weights, target_modules="(").keys() >= {"stray", "target_modules"}


def test_families_that_are_not_served_say_what_they_need() -> None:
    assert "gated attention" in refusals(peft_type="ADAPTION_PROMPT")["peft_type"]
    for kind, need in formats.NEEDS.items():
        assert kind not in formats.FORMATS
        assert f"it needs {need}" in refusals(peft_type=kind)["peft_type"]
    for unknown in ("lora", "", None, 3, ["LORA"], {"LORA": 1}, "x" * 10_000):
        reason = refusals(peft_type=unknown)["peft_type"]
        assert "served are LORA" in reason
        assert len(reason) < 600


def test_what_has_no_effect_is_noted() -> None:
    assert lower().notes == ()
    assert "fan_in_fan_out" in lower(fan_in_fan_out=True).notes[0]
