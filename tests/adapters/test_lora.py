from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from adaplex.adapters import formats
from adaplex.adapters.errors import AdapterInvalid, AdapterTooLarge
from adaplex.adapters.formats.lora.config import UNSUPPORTED
from adaplex.adapters.limits import AdapterLimits
from adapters.handmade import (
    BASE,
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
from adapters.plain_lora import A_QUERY, B_QUERY, lower, refusals, without


def test_a_plain_adapter_lowers_to_its_pairs() -> None:
    program = lower()
    assert program.family == "lora"
    assert program.traits.max_rank == 2
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


def test_keys_of_a_training_checkpoint_are_accepted() -> None:
    renamed = {key.replace(".weight", ".default.weight"): t for key, t in tensors().items()}
    assert [m.module for m in lower(renamed).modules] == [m.module for m in lower().modules]
    assert refusals(tensors() | renamed) == dict.fromkeys(renamed, "is given twice")


@pytest.mark.parametrize("half", ["A", "B"])
def test_a_missing_half_is_named(half: str) -> None:
    missing = f"{PREFIX}{QUERY}.lora_{half}.weight"
    assert refusals(without(missing)) == {missing: "is missing: a pair needs both halves"}


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
        (f"{PREFIX}{QUERY}.base_layer.lora_A.weight", "not a known tensor of LoRA"),
        (f"{PREFIX}{QUERY}.token_adapter.trainable_tokens_delta", "does not name"),
        (f"{PREFIX}{QUERY}.lora_C", "not a known tensor of LoRA"),
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
    assert refusals(tensors() | bias) == {f"{QUERY}.bias": "is present, but bias is 'none'"}
    norm = {f"{PREFIX}{NORM}.bias": torch.ones(HIDDEN)}
    found = refusals(tensors() | norm, bias="lora_only")
    assert found == {f"{NORM}.bias": "is present, but bias is 'lora_only'"}
    value = {f"{PREFIX}{VALUE}.bias": torch.ones(HIDDEN // 2)}
    found = refusals(tensors() | value, bias="all")
    assert found == {f"{VALUE}.bias": f"the base's {VALUE} has no bias"}
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
