"""What the extras of LoRA are refused for, each by its name."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor

from adaplex.adapters import formats
from adaplex.adapters.base_spec import BaseModule, BaseSpec
from adaplex.adapters.checkpoint import Checkpoint
from adaplex.adapters.errors import AdapterInvalid, AdapterTooLarge
from adaplex.adapters.formats.lora_config import CONFLICTS, EVERYWHERE
from adaplex.adapters.limits import AdapterLimits
from adaplex.adapters.program import AdapterProgram
from adapters.handmade import PREFIX, config

QUERY, GATE, NORM = "layers.0.q_proj", "layers.0.gate_proj", "layers.0.norm"
UP, DOWN = "layers.0.experts.gate_up_proj", "layers.0.experts.down_proj"
TABLE, HEAD = "embed_tokens", "lm_head"
LIMITS = AdapterLimits()
MODULES = [
    BaseModule(TABLE, "embedding", 20, 8),
    BaseModule(QUERY, "linear", 8, 6, has_bias=True),
    BaseModule(GATE, "linear", 8, 12),
    BaseModule(UP, "experts", 8, 12, experts=3),
    BaseModule(DOWN, "experts", 6, 8, experts=3),
    BaseModule(NORM, "norm", 8, 8, has_bias=True),
    BaseModule("layers.0", "block", 8, 8, layer=0, part="mlp"),
    BaseModule(HEAD, "linear", 8, 20, is_head=True),
]
WEIGHTS = {
    m.name: torch.randn(
        (20, 8) if m.kind == "embedding" else (8,) if m.kind == "norm" else (m.out_features, 8),
        generator=torch.Generator().manual_seed(i),
    )
    for i, m in enumerate(MODULES)
    if m.kind not in ("experts", "block")
}
BIASES = {QUERY: torch.full([6], 0.5), NORM: torch.full([8], 0.25)}


def base(**changes: Any) -> BaseSpec:
    fields: dict[str, Any] = {"tied": False, "weight": WEIGHTS.__getitem__} | changes
    modules = {m.name: m for m in MODULES}
    return BaseSpec("org/base", "base", "llama", modules, BIASES, **fields)


def pair(module: str, *, rank: int = 2, into: int = 8, out: int = 6) -> dict[str, Tensor]:
    return {
        f"{PREFIX}{module}.lora_A.weight": torch.ones(rank, into),
        f"{PREFIX}{module}.lora_B.weight": torch.ones(out, rank),
    }


def table(rank: int = 2) -> dict[str, Tensor]:
    return {
        f"{PREFIX}{TABLE}.lora_embedding_A": torch.randn(rank, 20),
        f"{PREFIX}{TABLE}.lora_embedding_B": torch.randn(8, rank),
    }


def rows(module: str, count: int = 2) -> dict[str, Tensor]:
    return {f"{PREFIX}{module}.token_adapter.trainable_tokens_delta": torch.ones(count, 8)}


def lower(
    weights: Mapping[str, Tensor],
    /,
    *,
    spec: BaseSpec | None = None,
    limits: AdapterLimits = LIMITS,
    **fields: Any,
) -> AdapterProgram:
    settings = config(**{"target_modules": ["q_proj"]} | fields)
    return formats.lower(Checkpoint(settings, dict(weights)), spec or base(), limits)


def refused(weights: Mapping[str, Tensor], /, **fields: Any) -> dict[str, str]:
    """Where -> why."""
    with pytest.raises(AdapterInvalid) as caught:
        lower(weights, **fields)
    return {refusal.where: refusal.reason for refusal in caught.value.refusals}


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
        ("alora_invocation_tokens", [20], "has token 20, the base has 20 tokens"),
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
    assert refused(pair(QUERY), **fields)[other] == f"does not go with {one}"


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
    assert refused(pair(QUERY) | there) == {key: "is there, but lora_bias is not set"}
    found = refused(pair(QUERY) | {key: torch.ones(5)}, lora_bias=True)
    assert found == {key: "has shape [5], expected [6]"}
    (module,) = lower(pair(QUERY) | there, lora_bias=True).modules
    assert module.bias is not None
    assert module.bias.tolist() == [2.0] * 6  # scaled


def test_magnitudes() -> None:
    key = f"{PREFIX}{QUERY}.lora_magnitude_vector"
    assert refused(pair(QUERY), use_dora=True) == {key: "is missing, but use_dora is set"}
    there = {key: torch.ones(6)}
    assert refused(pair(QUERY) | there) == {key: "is there, but use_dora is not set"}
    found = refused(pair(QUERY) | {key: torch.ones(8)}, use_dora=True)
    assert found == {key: "has shape [8], expected [6]"}
    unknown = BaseSpec("b", "b", "llama", base().modules, BIASES)
    found = refused(pair(QUERY) | there, use_dora=True, spec=unknown)
    assert found == {QUERY: "DoRA needs the base's weight, which is not known here"}
    no_length = base(weight=lambda _: torch.zeros(6, 8))
    idle = pair(QUERY) | {f"{PREFIX}{QUERY}.lora_B.weight": torch.zeros(6, 2)} | there
    assert "overflows" in refused(idle, use_dora=True, spec=no_length)[QUERY]


def test_magnitudes_of_an_embedding_take_memory() -> None:
    weights = table() | {f"{PREFIX}{TABLE}.lora_magnitude_vector": torch.ones(8)}
    fields: dict[str, Any] = {"target_modules": [TABLE], "use_dora": True}
    assert lower(weights, **fields).modules[0].primitives == ("replaced weight",)
    with pytest.raises(AdapterTooLarge, match="takes 320 bytes once it is read, the limit is 319"):
        lower(weights, limits=AdapterLimits(max_adapter_bytes=319), **fields)


def test_pairs_of_the_other_kind() -> None:
    wrong = pair(TABLE, into=20, out=8)
    found = refused(wrong, target_modules=[TABLE])
    assert found == dict.fromkeys(wrong, "does not fit a module of kind embedding")
    half = f"{PREFIX}{TABLE}.lora_embedding_B"
    found = refused({k: v for k, v in table().items() if k != half}, target_modules=[TABLE])
    assert found == {half: "half of a pair is missing"}
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
    reason = "a copy of it needs the base's weight, which is not known here"
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
    assert "no pattern" in refused(pair(QUERY), modules_to_save=["("])["modules_to_save"]


def test_norms_are_replaced_with_their_bias() -> None:
    weight = {f"{PREFIX}{NORM}.weight": torch.ones(8)}
    found = refused(pair(QUERY) | weight, modules_to_save=["norm"])
    assert found == {f"{NORM}.bias": "is missing; its weight is there"}
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
    assert found == {f"{PREFIX}{NORM}.original_module.bias": "is not the base's own bias"}
    gate = {f"{PREFIX}{GATE}.weight": torch.ones(12, 8), f"{PREFIX}{GATE}.bias": torch.ones(12)}
    found = refused(pair(QUERY) | gate, modules_to_save=["gate_proj"])
    assert found == {f"{GATE}.bias": "the base has no bias there"}


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
    assert found == {key: "has a token twice"}
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
        ({"gate_proj": [1]}, GATE, "has no rows to replace"),
        ({NORM: [1]}, NORM, "has no rows to replace"),
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
    assert found["ensure_weight_tying"] == "needs the same tokens for both layers"
    biased = base(tied=True)
    head = BaseModule(HEAD, "linear", 8, 20, has_bias=True, is_head=True)
    biased = BaseSpec(
        "b", "b", "llama", {**biased.modules, HEAD: head}, tied=True, weight=biased.weight
    )
    found = refused(weights, trainable_token_indices=[3, 5], spec=biased)
    assert found == {HEAD: "has a bias, which PEFT leaves out with trainable tokens"}


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
    assert found == dict.fromkeys(other, "is not the embedding's, as ensure_weight_tying asks for")
    magnitude = {f"{PREFIX}{TABLE}.lora_magnitude_vector": torch.ones(8)}
    found = refused(table() | magnitude, use_dora=True, **fields)
    assert found == {"use_dora": "does not go with ensure_weight_tying"}

    fields |= {"target_modules": ["q_proj"], "modules_to_save": [TABLE]}
    whole = pair(QUERY) | {f"{PREFIX}{TABLE}.weight": torch.ones(20, 8)}
    made = lower(whole, **fields)
    assert {m.module for m in made.modules if m.weight is not None} == {TABLE, HEAD}
    key = f"{PREFIX}{HEAD}.weight"
    found = refused(whole | {key: torch.zeros(20, 8)}, **fields)
    assert found == {key: "is not the embedding's, as ensure_weight_tying asks for"}


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
    assert made.max_rank == 6
    found = refused(outer, **fields)
    assert found == {UP: "is named by target_modules, but has no tensors"}
    found = refused(inner | outer, target_modules=[], target_parameters=["gate_up_proj"])
    assert found.keys() >= set(inner)
    narrow = pair("layers.0.experts", rank=2, into=6, out=8)
    assert len(refused(inner | narrow, **fields)) == 2
    with pytest.raises(AdapterTooLarge, match="has rank 2, the limit is 1"):
        lower(inner | outer, limits=AdapterLimits(max_rank=1), **fields)
    assert lower(inner | outer, limits=AdapterLimits(max_rank=2), **fields)


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
        (delta(TABLE), {"novel": 1}, "novel", "not a field of trainable tokens"),
        (delta(TABLE), {"target_modules": 3}, "target_modules", "string or a list of strings"),
        (delta(TABLE), {"target_modules": ["wte"]}, "target_modules", "matches no module"),
        (delta(TABLE), {"target_modules": ["q_proj"]}, QUERY, "has no rows to replace"),
        (delta(TABLE), {"target_modules": [HEAD]}, HEAD, "its trained tokens are missing"),
        (delta(TABLE, 3), {}, f"{PREFIX}{TABLE}.trainable_tokens_delta", "expected [2, 8]"),
        ({"x": torch.ones(1)}, {}, "x", "does not begin with"),
        ({f"{PREFIX}x": torch.ones(1)}, {}, f"{PREFIX}x", "is not a tensor of trainable tokens"),
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
    with pytest.raises(AdapterInvalid, match="is not the base's own weight"):
        trained(delta(TABLE) | {key: WEIGHTS[TABLE] + 1})
    twice = {f"{PREFIX}{TABLE}.trainable_tokens_delta.default": torch.ones(2, 8)}
    with pytest.raises(AdapterInvalid, match="is given twice"):
        trained(delta(TABLE) | twice)
