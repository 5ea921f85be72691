"""AdapterHub's files: what is refused of them, by name."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from adaplex.adapters import formats
from adaplex.adapters.checkpoint import Checkpoint
from adaplex.adapters.errors import AdapterInvalid, AdapterTooLarge
from adaplex.adapters.limits import AdapterLimits
from adaplex.adapters.program.base_spec import BaseSpec
from adapters.adapterhub_files import BASE, changed, lower, make_base, outer, read, retensored

UP = "model.layers.0.output_adapters.adapters.pfeiffer.adapter_up.weight"
UNITED = read("mam").config["config"]["configs"]
METHOD: dict[str, tuple[str, dict[str, Any], str, str]] = {
    "layer norm before": ("pfeiffer", {"ln_before": True}, "ln_before", "statistics"),
    "layer norm after": ("pfeiffer", {"ln_after": True}, "ln_after", "layer norm"),
    "gates": ("pfeiffer", {"use_gating": True}, "use_gating", "gates"),
    "gates of LoRA": ("lora", {"use_gating": True}, "use_gating", "gates"),
    "Compacter": ("pfeiffer", {"phm_layer": True}, "phm_layer", "hypercomplex"),
    "invertible": ("pfeiffer", {"inv_adapter": "nice"}, "inv_adapter", "invertible"),
    "VeRA": ("lora", {"vera_d": 0.1}, "vera_d", "PEFT's format"),
    "unknown": (
        "pfeiffer", {"speed": 3}, "speed", "is not a known field of AdapterHub's bottlenecks",
    ),
    "residual twice": (
        "pfeiffer", {"residual_before_ln": False}, "original_ln_before", "adds it twice",
    ),
    "residual lost": (
        "houlsby", {"original_ln_after": False}, "original_ln_before", "omits the residual stream",
    ),
    "residual lost beside": (
        "parallel", {"original_ln_after": False}, "original_ln_before", "omits the residual stream",
    ),
    "residual of another norm": (
        "pfeiffer", {"residual_before_ln": "post_add"}, "original_ln_before", "post_add",
    ),
    "no flag": ("pfeiffer", {"is_parallel": "yes"}, "is_parallel", "true or false"),
    "activation": ("pfeiffer", {"non_linearity": "mish"}, "non_linearity", "'mish' is not served"),
    "no activation": ("pfeiffer", {"non_linearity": 3}, "non_linearity", "is not served"),
    "scaling": ("pfeiffer", {"scaling": "large"}, "scaling", "a number, or one of learned"),
    "endless scaling": ("pfeiffer", {"scaling": float("inf")}, "scaling", "a number"),
    "factor": ("pfeiffer", {"reduction_factor": 0}, "reduction_factor", "at least 0.001"),
    "no factor": ("pfeiffer", {"reduction_factor": "16"}, "reduction_factor", "a number"),
    "a layer's factor": (
        "pfeiffer", {"reduction_factor": {"0": 4}}, "reduction_factor", "has no factor for layer 1",
    ),
    "layers": ("pfeiffer", {"leave_out": [1.5]}, "leave_out", "a list of layers"),
    "rank": ("lora", {"r": 0}, "r", "a positive integer"),
    "alpha": ("lora", {"alpha": -1}, "alpha", "a positive number"),
    "mode": ("lora", {"composition_mode": "sub"}, "composition_mode", "add or scale"),
    "rank of (IA)^3": ("ia3", {"r": 2}, "r", "1, without use_dora, for scale"),
    "matrices": ("lora", {"attn_matrices": ["o"]}, "attn_matrices", "a list of q, k and v"),
}  # fmt: skip


@pytest.mark.parametrize("case", METHOD)
def test_what_a_method_cannot_be_served_with_is_refused_by_field(case: str) -> None:
    name, fields, where, reason = METHOD[case]
    with pytest.raises(AdapterInvalid) as caught:
        lower(changed(name, **fields))
    assert caught.value.field == f"config.{where}"
    assert reason in caught.value.refusals[0].reason


PREFIX: dict[str, tuple[dict[str, Any], str, str]] = {
    "gates": ({"use_gating": True}, "use_gating", "gates"),
    "length": ({"prefix_length": 0}, "prefix_length", "a positive integer"),
    "activation": ({"non_linearity": "mish"}, "non_linearity", "must be one of"),
    "layers": ({"leave_out": [0]}, "leave_out", "must be empty: every layer needs"),
}


@pytest.mark.parametrize("case", PREFIX)
def test_fields_of_a_part_are_refused_by_their_place(case: str) -> None:
    fields, where, reason = PREFIX[case]
    with pytest.raises(AdapterInvalid) as caught:
        lower(changed("mam", configs=[UNITED[0] | fields, UNITED[1]]))
    assert caught.value.field == f"config.configs[0].{where}"
    assert reason in caught.value.refusals[0].reason


@pytest.mark.parametrize("fields", [{"rotary": None}, {"kv_shapes": ((2, 16, 16), (2, 8, 8))}])
def test_a_prefix_needs_keys_that_can_be_turned(fields: dict[str, Any]) -> None:
    needed = "needs a base of type llama or mistral with rotary keys of one shape"
    with pytest.raises(AdapterInvalid, match=needed):
        lower(read("mam"), make_base(**fields))


OUTER: dict[str, tuple[Checkpoint, str, str]] = {
    "model": (outer("pfeiffer", model_type="bert"), "model_type", "served are llama, mistral"),
    "odd model": (outer("pfeiffer", model_type=["llama"]), "model_type", "is not served"),
    "other model": (outer("pfeiffer", model_type="qwen2"), "model_type", "org/tiny is llama"),
    "name": (outer("pfeiffer", name=None), "name", "must be the adapter's name"),
    "version": (outer("pfeiffer", version="3.2.1"), "version", "adapters.1.3.0"),
    "field": (outer("pfeiffer", peft_type="ADAPTERHUB"), "peft_type", "is not a known field"),
    "no union": (changed("mam", configs={}), "config.configs", "a list of objects"),
    "no part": (changed("mam", configs=[UNITED[0], 3]), "config.configs[1]", "an object"),
    "method": (
        changed("pfeiffer", architecture="reft"),
        "config.architecture",
        "it needs interventions",
    ),
    "prompt tuning": (
        changed("pfeiffer", architecture="prompt_tuning"),
        "config.architecture",
        "for no model served here",
    ),
    "odd method": (changed("pfeiffer", architecture=[1]), "config.architecture", "is not served"),
    "nothing": (changed("pfeiffer", leave_out=[0, 1]), "layers.0.output_adapters", "is present"),
    "place": (
        changed("pfeiffer", mh_adapter=True),
        "layers.0.attention_adapters",
        "has no tensors",
    ),
    "place twice": (
        changed("mam", configs=[UNITED[1], UNITED[1]]),
        "layers.0.output_adapters",
        "has no tensors",
    ),
    "missing tensor": (
        retensored("pfeiffer", {UP: None}),
        "layers.0.output_adapters.adapter_up.weight",
        "is missing",
    ),
    "shape": (
        retensored("pfeiffer", {UP: torch.ones(3, 3)}),
        "layers.0.output_adapters.adapter_up.weight",
        "has shape [3, 3], expected [64, 16]",
    ),
    "other tensor": (
        retensored("pfeiffer", {UP.replace("up", "gate"): torch.ones(1)}),
        "layers.0.output_adapters.adapter_gate.weight",
        "is not a tensor that the config describes",
    ),
    "other adapter": (
        retensored("pfeiffer", {UP.replace("pfeiffer", "other"): torch.ones(1)}),
        UP.replace("pfeiffer", "other"),
        "does not belong to the adapter 'pfeiffer'",
    ),
    "given twice": (
        retensored("pfeiffer", {UP.removeprefix("model."): torch.ones(1)}),
        UP.removeprefix("model."),
        "is given twice",
    ),
    "odd tensor": (retensored("pfeiffer", {"lone": torch.ones(1)}), "lone", "is present"),
}


@pytest.mark.parametrize("case", OUTER)
def test_what_does_not_fit_is_refused_by_name(case: str) -> None:
    found, where, reason = OUTER[case]
    with pytest.raises(AdapterInvalid) as caught:
        lower(found)
    assert caught.value.field == where
    assert reason in caught.value.refusals[0].reason


def test_ranks_are_limited() -> None:
    with pytest.raises(AdapterTooLarge, match="r is 4, the limit is 3"):
        formats.lower(read("lora"), BASE, AdapterLimits(max_rank=3))


def test_a_base_without_the_blocks_is_refused_by_module() -> None:
    linears = {name: module for name, module in BASE.modules.items() if module.kind == "linear"}
    with pytest.raises(AdapterInvalid, match="the base org/tiny has no such module"):
        lower(read("pfeiffer"), BaseSpec("org/tiny", "digest", "llama", linears))


def test_magnitudes_need_the_weight() -> None:
    unknown = BaseSpec("org/tiny", "digest", "llama", BASE.modules)
    with pytest.raises(AdapterInvalid, match="DoRA needs the base's weight") as caught:
        lower(read("dora"), unknown)
    assert caught.value.field == "model.layers.0.self_attn.q_proj"
