"""Adapters that PEFT saved after the vocabulary was resized, against PEFT on the resized base."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel

from adaplex.adapters import formats
from adaplex.adapters.checkpoint import WEIGHTS, read_checkpoint
from adaplex.adapters.errors import AdapterInvalid
from adaplex.adapters.limits import AdapterLimits
from adaplex.adapters.program.program import AdapterProgram
from peft_adapters import load_plain
from primitives import describe, logits
from tiny import VOCAB, save_tiny

LIMITS = AdapterLimits()
RESIZED = VOCAB + 8
TOKENS = [VOCAB, VOCAB + 1]
PROMPT = [10, VOCAB + 1, 7, VOCAB + 2]
LORA: dict[str, dict[str, Any]] = {
    "linears": {},
    "tokens": {"trainable_token_indices": TOKENS},
    "tokens-of-both": {"trainable_token_indices": {"embed_tokens": TOKENS, "lm_head": [VOCAB + 2]}},
    "same-tokens": {"trainable_token_indices": {"embed_tokens": TOKENS, "lm_head": TOKENS}},
    "tokens-of-the-head": {"trainable_token_indices": {"lm_head": TOKENS}},
    "tied-tokens": {"trainable_token_indices": TOKENS, "ensure_weight_tying": True},
    "saved-both": {"modules_to_save": ["embed_tokens", "lm_head"]},
    "saved-table": {"modules_to_save": ["embed_tokens"]},
    "saved-head": {"modules_to_save": ["lm_head"]},
    "saved-tied": {"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True},
    "pairs": {"target_modules": ["q_proj", "embed_tokens", "lm_head"]},
    "pair-of-the-table": {"target_modules": ["embed_tokens"]},
    "pair-of-the-head": {"target_modules": ["q_proj", "lm_head"]},
    "dora": {"target_modules": ["q_proj", "embed_tokens"], "use_dora": True},
}
OTHERS: dict[str, tuple[type[Any], dict[str, Any]]] = {
    "trainable-tokens": (peft.TrainableTokensConfig, {"token_indices": TOKENS}),
    "ia3": (
        peft.IA3Config,
        {
            "target_modules": ["q_proj"],
            "feedforward_modules": [],
            "modules_to_save": ["embed_tokens", "lm_head"],
        },
    ),
    "loha": (peft.LoHaConfig, {"target_modules": ["q_proj"]}),
    "vera": (peft.VeraConfig, {"target_modules": ["q_proj"]}),
    "ln-tuning": (peft.LNTuningConfig, {"target_modules": ["input_layernorm"]}),
    "prompt-tuning": (peft.PromptTuningConfig, {"num_virtual_tokens": 4}),
}


@dataclass
class Resized:
    """A base on disk, and the same base with more tokens, the new rows drawn twice."""

    hub: Path
    trained_on: PreTrainedModel
    redrawn: PreTrainedModel


@pytest.fixture(scope="module", params=[False, True], ids=["untied", "tied"])
def resized(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Resized:
    folder = tmp_path_factory.mktemp("resized")
    hub = save_tiny("llama", folder / "hub", num_hidden_layers=1, tie_word_embeddings=request.param)
    model = load_plain(hub)
    torch.manual_seed(1)
    model.resize_token_embeddings(RESIZED, mean_resizing=False)
    redrawn: Any = copy.deepcopy(model)
    for end in (redrawn.get_input_embeddings(), redrawn.get_output_embeddings()):
        end.weight.data[VOCAB:] = torch.randn(8, 64) * 0.1
    if request.param:
        redrawn.tie_weights()
    return Resized(hub, model, redrawn)


def save(resized: Resized, config: Any, directory: Path) -> Path:
    """Saves a random adapter that was trained on the resized base of `hub`."""
    torch.manual_seed(3)
    tuned = peft.get_peft_model(copy.deepcopy(resized.trained_on), config)  # type: ignore[arg-type]
    tuned.peft_config["default"].base_model_name_or_path = str(resized.hub)
    for parameter in tuned.parameters():
        if parameter.requires_grad:
            parameter.data += torch.randn_like(parameter) * 0.1
    tuned.save_pretrained(directory)
    return directory


def lower(directory: Path, model: PreTrainedModel) -> AdapterProgram:
    return formats.lower(read_checkpoint(directory, LIMITS), describe(model), LIMITS)


@torch.no_grad()
def check(directory: Path, resized: Resized) -> None:
    """Both bases with the adapter give PEFT's logits, and the adapter changes them."""
    keys = load_file(directory / WEIGHTS).keys()
    assert any("embed_tokens" in key or "lm_head" in key for key in keys)
    for model in (resized.trained_on, resized.redrawn):
        oracle: Any = peft.PeftModel.from_pretrained(copy.deepcopy(model), directory).eval()
        expected = oracle(torch.tensor([PROMPT])).logits[0, -1]
        program = lower(directory, model)
        found = logits(model, program, PROMPT)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
        assert (found - model(torch.tensor([PROMPT])).logits[0, -1]).abs().max() > 1e-2
        if model is resized.trained_on:
            assert program.warnings == ()


@pytest.mark.parametrize("form", LORA)
def test_lora_after_resizing_is_pefts(form: str, resized: Resized, tmp_path: Path) -> None:
    fields = {"target_modules": ["q_proj"], **LORA[form]}
    check(save(resized, peft.LoraConfig(task_type="CAUSAL_LM", **fields), tmp_path), resized)


def test_a_copy_that_differs_from_the_base_is_named(resized: Resized, tmp_path: Path) -> None:
    config = peft.LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"])
    program = lower(save(resized, config, tmp_path), resized.redrawn)
    assert [warning.partition(":")[0] for warning in program.warnings] == [
        "model.embed_tokens",
        "lm_head",
    ]


@pytest.mark.parametrize("family", OTHERS)
def test_other_families_after_resizing_are_pefts(
    family: str, resized: Resized, tmp_path: Path
) -> None:
    kind, fields = OTHERS[family]
    check(save(resized, kind(task_type="CAUSAL_LM", **fields), tmp_path), resized)


def test_a_base_of_another_vocabulary_is_named(resized: Resized, tmp_path: Path) -> None:
    config = peft.LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"])
    directory = save(resized, config, tmp_path)
    with pytest.raises(AdapterInvalid) as caught:
        lower(directory, load_plain(resized.hub))
    refusals = {refusal.where: refusal.reason for refusal in caught.value.refusals}
    assert refusals.keys() == {
        f"base_model.model.{end}.weight" for end in ("lm_head", "model.embed_tokens")
    }
    for reason in refusals.values():
        assert "has 328 tokens, the base has 320" in reason
        assert "serve the base as it was then" in reason


@pytest.mark.parametrize(
    ("end", "reason"),
    [
        ("original_module.weight", "differs from another copy of the same weight"),
        ("modules_to_save.weight", "differs from base_model.model.lm_head.weight"),
    ],
)
def test_copies_that_differ_from_each_other_are_refused(
    end: str, reason: str, resized: Resized, tmp_path: Path
) -> None:
    config = peft.LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"])
    directory = save(resized, config, tmp_path)
    key = f"base_model.model.lm_head.{end}"
    tensors = load_file(directory / WEIGHTS)
    tensors[key] = torch.ones(RESIZED, 64)
    save_file(tensors, directory / WEIGHTS, {"format": "pt"})
    with pytest.raises(AdapterInvalid) as caught:
        lower(directory, resized.trained_on)
    assert reason in [refusal.reason for refusal in caught.value.refusals]
