"""Pairs of single experts, as adapters for transformers 4 have them, against PEFT."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from adaplex.adapters import formats
from adaplex.adapters.checkpoint import CONFIG, WEIGHTS, read_checkpoint
from adaplex.adapters.errors import AdapterInvalid
from adaplex.adapters.limits import AdapterLimits
from adaplex.adapters.program.program import AdapterProgram
from primitives import describe, logits

LIMITS = AdapterLimits()
LAYERS, EXPERTS, HIDDEN, INNER = 2, 4, 32, 24
SIZES: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": HIDDEN,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "num_experts_per_tok": 2,
}
QWEN: dict[str, Any] = {
    "num_experts": EXPERTS,
    "moe_intermediate_size": INNER,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
}
ARCHITECTURES: dict[str, tuple[dict[str, Any], str, tuple[str, str, str]]] = {
    "mixtral": (
        {"num_local_experts": EXPERTS, "intermediate_size": INNER},
        "block_sparse_moe",
        ("w1", "w3", "w2"),
    ),
    "qwen3_moe": (QWEN, "mlp", ("gate_proj", "up_proj", "down_proj")),
    "olmoe": (
        {"num_experts": EXPERTS, "intermediate_size": INNER},
        "mlp",
        ("gate_proj", "up_proj", "down_proj"),
    ),
}
"""Config, name of the block in transformers 4, and names of the gate, up and down projections."""
TOKENS = [5, 9, 60, 33]


@pytest.fixture(scope="module", params=ARCHITECTURES)
def base(request: pytest.FixtureRequest) -> tuple[str, PreTrainedModel]:
    torch.manual_seed(0)
    config = AutoConfig.for_model(request.param, **SIZES, **ARCHITECTURES[request.param][0])
    model: Any = AutoModelForCausalLM.from_config(config, attn_implementation="eager").float()
    for parameter in model.parameters():
        parameter.data.normal_(0, 0.2)
    return request.param, model.eval()


def pair(name: str, inner: int, outer: int, rank: int = 3) -> dict[str, Tensor]:
    return {
        f"base_model.model.{name}.lora_A.weight": torch.randn(rank, inner) * 0.3,
        f"base_model.model.{name}.lora_B.weight": torch.randn(outer, rank) * 0.3,
    }


def tensors(architecture: str, *projections: str) -> dict[str, Tensor]:
    """Returns the pairs of these projections of each expert; by default of all three."""
    torch.manual_seed(2)
    _, block, names = ARCHITECTURES[architecture]
    gate, up, down = names
    sizes = {gate: (HIDDEN, INNER), up: (HIDDEN, INNER), down: (INNER, HIDDEN)}
    found: dict[str, Tensor] = {}
    for layer in range(LAYERS):
        for expert in range(EXPERTS):
            for projection in projections or names:
                name = f"model.layers.{layer}.{block}.experts.{expert}.{projection}"
                found |= pair(name, *sizes[projection])
    return found


def write(folder: Path, found: dict[str, Tensor], targets: Any, **fields: Any) -> Path:
    settings = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": 3, "lora_alpha": 6}
    settings |= {"target_modules": targets, "bias": "none", "lora_dropout": 0.0} | fields
    (folder / CONFIG).write_text(json.dumps(settings))
    save_file(found, folder / WEIGHTS, {"format": "pt"})
    return folder


def lower(folder: Path, model: PreTrainedModel) -> AdapterProgram:
    return formats.lower(read_checkpoint(folder, LIMITS), describe(model), LIMITS)


@torch.no_grad()
def check(folder: Path, model: PreTrainedModel) -> None:
    """The adapter gives PEFT's logits, and changes those of the base."""
    oracle: Any = peft.PeftModel.from_pretrained(copy.deepcopy(model), folder).eval()
    expected = oracle(torch.tensor([TOKENS])).logits[0, -1]
    found = logits(model, lower(folder, model), TOKENS)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert (found - model(torch.tensor([TOKENS])).logits[0, -1]).abs().max() > 1e-2


@pytest.mark.parametrize("form", ["all", "rslora", "regex", "training", "down"])
def test_pairs_of_single_experts_are_pefts(
    form: str, base: tuple[str, PreTrainedModel], tmp_path: Path
) -> None:
    architecture, model = base
    names = ARCHITECTURES[architecture][2]
    found = tensors(architecture, names[2]) if form == "down" else tensors(architecture)
    for layer in range(LAYERS):
        found |= pair(f"model.layers.{layer}.self_attn.q_proj", HIDDEN, HIDDEN)
    targets: Any = [*(names[2:] if form == "down" else names), "q_proj"]
    if form == "regex":
        targets = rf".*\.({'|'.join(targets)})"
    check(write(tmp_path, found, targets, use_rslora=form == "rslora"), model)
    if form == "training":  # keys as in a checkpoint of the training, with the adapter's name
        named = {key.replace(".weight", ".default.weight"): t for key, t in found.items()}
        training = tmp_path / "training"
        training.mkdir()
        program = lower(write(training, named, targets), model)
        for one, other in zip(program.modules, lower(tmp_path, model).modules, strict=True):
            assert one.low_rank is not None
            assert other.low_rank is not None
            assert torch.equal(one.low_rank.b, other.low_rank.b)


@torch.no_grad()
def test_ranks_may_differ_and_projections_may_be_missing(
    base: tuple[str, PreTrainedModel], tmp_path: Path
) -> None:
    architecture, model = base
    _, block, (gate, _, down) = ARCHITECTURES[architecture]
    found = tensors(architecture, gate)
    name = f"model.layers.1.{block}.experts.2.{down}"
    found |= pair(name, INNER, HIDDEN, rank=5)
    fields: dict[str, Any] = {"rank_pattern": {down: 5}, "alpha_pattern": {down: 20}}
    program = lower(write(tmp_path, found, [gate, down], **fields), model)
    by_hand = copy.deepcopy(model)
    weights = dict(by_hand.named_parameters())
    for key in (key for key in found if "lora_A" in key):
        words = key.split(".")
        delta = found[key.replace("lora_A", "lora_B")] @ found[key]
        fused = "down_proj" if words[-3] == down else "gate_up_proj"
        weight = weights[f"model.layers.{words[4]}.mlp.experts.{fused}"].data[int(words[7])]
        weight[: delta.shape[0]] += delta * (4 if words[-3] == down else 2)
    expected = by_hand(torch.tensor([TOKENS])).logits[0, -1]  # type: ignore[operator]
    torch.testing.assert_close(logits(model, program, TOKENS), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("key", "shape", "reason"),
    [
        ("experts.9.down_proj.lora_A.weight", (3, INNER), "is not among the base's 4 experts"),
        ("experts.0.down_proj.lora_A.weight", (3, INNER + 1), "expected [3, 24]"),
        ("experts.0.down_proj.lora_magnitude_vector", (HIDDEN,), "not served for a single expert"),
        ("experts.0.middle.lora_A.weight", (3, INNER), "has no such module"),
    ],
)
def test_other_tensors_of_experts_are_refused(
    key: str, shape: tuple[int, ...], reason: str, tmp_path: Path
) -> None:
    config = AutoConfig.for_model("qwen3_moe", **SIZES, **QWEN)
    model = AutoModelForCausalLM.from_config(config)
    found = tensors("qwen3_moe") | {f"base_model.model.model.layers.0.mlp.{key}": torch.ones(shape)}
    with pytest.raises(AdapterInvalid) as caught:
        lower(write(tmp_path, found, ["gate_proj", "up_proj", "down_proj"]), model)
    assert any(reason in refusal.reason for refusal in caught.value.refusals)
    found = tensors("qwen3_moe")
    with pytest.raises(AdapterInvalid, match="target_modules does not name it"):
        lower(write(tmp_path, found, ["gate_proj", "up_proj"]), model)


@pytest.mark.parametrize("earlier", [False, True])
def test_a_router_is_refused_as_one(
    earlier: bool, base: tuple[str, PreTrainedModel], tmp_path: Path
) -> None:
    architecture, model = base
    block = ARCHITECTURES[architecture][1] if earlier else "mlp"
    found: dict[str, Tensor] = {}
    for layer in range(LAYERS):
        found |= pair(f"model.layers.{layer}.{block}.gate", HIDDEN, EXPERTS)
        found |= pair(f"model.layers.{layer}.self_attn.q_proj", HIDDEN, HIDDEN)
    targets = ["q_proj", "gate"] if earlier else ["q_proj"]
    parameters = None if earlier else ["mlp.gate.weight"]
    with pytest.raises(AdapterInvalid) as caught:
        lower(write(tmp_path, found, targets, target_parameters=parameters), model)
    assert {refusal.where: refusal.reason for refusal in caught.value.refusals} == {
        f"model.layers.{layer}.{block}.gate": "is a router of experts, which adapters cannot change"
        for layer in range(LAYERS)
    }
