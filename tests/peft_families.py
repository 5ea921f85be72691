"""Random adapters of every family of HF PEFT that change the output, and PEFT as their oracle."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import peft
import torch
from peft.tuners.lora.layer import Linear
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from adaplex.adapters.checkpoint import CONFIG, WEIGHTS
from peft_adapters import (
    Oracle,
    attention,
    everything,
    load_plain,
    resolve_with_qalora,
    save_adapter,
)

Randomize = Callable[[str, Tensor], None]
"""Fills a parameter, by name, so that the adapter changes the output."""
TASK = 1
"""The served task of a multitask adapter."""


@dataclass(frozen=True)
class Family:
    """How to save a random adapter of one family, and the oracle of its output."""

    save: Callable[[Path, Path, int], Path]
    """Saves an adapter; arguments are the model's directory, the adapter's and a seed."""
    oracle: Callable[[Path, Path], Oracle]
    """Returns the oracle of the model and the adapter in two directories."""
    invocation: tuple[int, ...] = ()
    """Tokens that a prompt must have for the adapter to be applied."""

    def prompt(self, tokens: list[int]) -> list[int]:
        """Returns the prompt with the invocation in its middle."""
        middle = len(tokens) // 2
        return [*tokens[:middle], *self.invocation, *tokens[middle:]]


class TaskOracle(Oracle):
    """The oracle of a multitask adapter's TASK; it decodes without a KV cache."""

    @torch.no_grad()
    def logits(self, tokens: list[int]) -> Tensor:
        """Returns logits [vocabulary] after the last token."""
        task = torch.tensor([TASK])
        out: Tensor = self.model(torch.tensor([tokens]), task_ids=task).logits[0, -1]
        return out.float()

    def greedy(self, tokens: list[int], count: int) -> list[int]:
        """Returns the next `count` tokens."""
        grown = list(tokens)
        for _ in range(count):
            grown.append(int(self.logits(grown).argmax()))
        return grown[len(tokens) :]


class BiasOracle(Oracle):
    """The oracle of BitFit, which PEFT lacks: the base with the adapter's biases."""

    def __init__(self, base: PreTrainedModel, adapter: Path) -> None:
        super().__init__(base, None)
        for key, bias in load_file(adapter / WEIGHTS).items():
            module: Any = base.get_submodule(key.removeprefix("base_model.model.")[: -len(".bias")])
            if isinstance(getattr(module, "bias", None), nn.Parameter):
                module.bias.data = bias
            elif isinstance(module, nn.Linear):
                module.bias = nn.Parameter(bias)
            else:
                module.register_forward_hook(lambda _, inputs, y, bias=bias: y + bias)


def normal(size: float = 0.1, mean: float = 0.0) -> Randomize:
    """Returns a Randomize that draws every trained parameter from a normal distribution."""
    return lambda name, parameter: parameter.normal_(mean, size)  # type: ignore[return-value]


def around(size: float = 0.2) -> Randomize:
    """Returns a Randomize that adds normal noise to every trained parameter."""
    return lambda name, parameter: parameter.add_(torch.randn_like(parameter) * size)  # type: ignore[return-value]


def _saved(
    config: Callable[[str], peft.PeftConfig],
    randomize: Randomize,
    finish: Callable[[Any], None] = lambda tuned: None,
) -> Callable[[Path, Path, int], Path]:
    """Returns a function that saves an adapter of `config` with random parameters."""

    def save(model: Path, directory: Path, seed: int) -> Path:
        torch.manual_seed(seed)
        base = load_plain(model)
        tuned: Any = peft.get_peft_model(base, config(base.config.model_type))
        with torch.no_grad():
            for name, parameter in tuned.named_parameters():
                if parameter.requires_grad:
                    randomize(name, parameter)
        finish(tuned)
        tuned.save_pretrained(directory)
        return directory

    return save


def family(
    config: Callable[[str], peft.PeftConfig],
    randomize: Randomize,
    finish: Callable[[Any], None] = lambda tuned: None,
) -> Family:
    """Returns a family that PEFT saves and loads."""
    return Family(
        _saved(config, randomize, finish),
        lambda model, adapter: Oracle(load_plain(model), adapter),
    )


def _prune(tuned: Any) -> None:
    """Prunes ranks as AdaLoRA's allocator does: all of the first module, every third of others."""
    names = [n for n, _ in tuned.base_model.model.named_parameters() if ".lora_E." in n]
    config = tuned.peft_config["default"]
    config.rank_pattern = {
        name: [i > 0 and j % 3 != i % 3 for j in range(config.init_r)]
        for i, name in enumerate(names)
    }


def _singular(name: str, parameter: Tensor) -> None:
    parameter.normal_(0, 1.0 if "lora_E" in name else 0.3)


def _scales(name: str, parameter: Tensor) -> None:
    parameter.normal_(0, 0.5)


def _add_task(model: Path, directory: Path, seed: int) -> Path:
    """Saves a multitask adapter whose config names the task to serve."""
    make = _saved(
        lambda a: peft.MultitaskPromptTuningConfig(
            task_type="CAUSAL_LM", num_virtual_tokens=5, num_tasks=3, num_ranks=2
        ),
        normal(0.7),
    )
    make(model, directory, seed)
    config = json.loads((directory / CONFIG).read_text())
    (directory / CONFIG).write_text(json.dumps(config | {"task_id": TASK}))
    return directory


def _bitfit(model: Path, directory: Path, seed: int) -> Path:
    """Saves biases for every linear and norm, including those that have none."""
    torch.manual_seed(seed)
    biases = {
        f"base_model.model.{name}.bias": torch.randn(_width(module)) * 0.1
        for name, module in load_plain(model).named_modules()
        if isinstance(getattr(module, "weight", None), nn.Parameter)
        and not isinstance(module, nn.Embedding)
    }
    directory.mkdir(parents=True)
    (directory / CONFIG).write_text(json.dumps({"peft_type": "BITFIT"}))
    save_file(biases, directory / WEIGHTS)
    return directory


def _width(module: Any) -> int:
    return int(getattr(module, "nf", 0) or module.weight.shape[0])


NORMS = {"gpt2": ["ln_1", "ln_2", "ln_f"]}
FEEDFORWARD = {"gpt2": ["mlp.c_proj"]}


def _all(architecture: str) -> list[str]:
    return everything(architecture)


def _norms(architecture: str) -> list[str]:
    return NORMS.get(architecture, ["input_layernorm", "post_attention_layernorm", "norm"])


def _feedforward(architecture: str) -> list[str]:
    return FEEDFORWARD.get(architecture, ["up_proj", "down_proj"])


def _prompt(kind: type, **fields: Any) -> Callable[[str], peft.PeftConfig]:
    return lambda a: kind(task_type="CAUSAL_LM", num_virtual_tokens=5, **fields)


def lora(**fields: Any) -> Family:
    """Returns LoRA with the fields, by default on the attention projections."""

    def save(model: Path, directory: Path, seed: int) -> Path:
        base = load_plain(model)
        targets = {"target_modules": attention(base.config.model_type)}
        more = {"r": 4, "lora_alpha": 6, **targets, **fields}
        return save_adapter(base, directory, seed=seed, size=0.2, **more)

    return Family(
        save,
        lambda model, adapter: Oracle(load_plain(model), adapter),
        tuple(fields.get("alora_invocation_tokens") or ()),
    )


def _pooled(made: Family) -> Family:
    """Returns the family, saved and loaded with QA-LoRA for all of PEFT's linears."""

    def patched(call: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any) -> Any:
            with patch.object(Linear, "resolve_lora_variant", resolve_with_qalora):
                return call(*args)

        return run

    return replace(made, save=patched(made.save), oracle=patched(made.oracle))


LORAS: Mapping[str, Family] = {
    "lora": lora(),
    "lora-rs-bias": lora(use_rslora=True, bias="lora_only", lora_bias=True),
    "lora-embedding": lora(target_modules=["embed_tokens", "q_proj", "wte"]),
    "lora-head": lora(target_modules=["lm_head"]),
    "lora-whole": lora(modules_to_save=["norm", "lm_head"]),
    "lora-tokens": lora(trainable_token_indices=[7, 250, 3]),
    "dora": lora(use_dora=True, target_modules=r".*(q_proj|down_proj|c_attn)"),
    "alora": lora(alora_invocation_tokens=[301, 302]),
    "qalora": _pooled(
        lora(use_qalora=True, qalora_group_size=16, target_modules=["q_proj", "down_proj"])
    ),
    "trainable-tokens": family(
        lambda a: peft.TrainableTokensConfig(
            token_indices=[9, 40], target_modules=["wte" if a == "gpt2" else "embed_tokens"]
        ),
        around(),
    ),
}
"""LoRA and its variants."""
FAMILIES: Mapping[str, Family] = {
    "adalora": family(
        lambda a: peft.AdaLoraConfig(
            init_r=6, lora_alpha=4, total_step=10, target_modules=_all(a), bias="lora_only"
        ),
        _singular,
        _prune,
    ),
    "adalora-whole": family(
        lambda a: peft.AdaLoraConfig(
            init_r=4, lora_alpha=0, total_step=10, target_modules=attention(a)
        ),
        _singular,
    ),
    "vera": family(lambda a: peft.VeraConfig(r=24, target_modules=_all(a)), _scales),
    "vera-key": family(
        lambda a: peft.VeraConfig(
            r=16, target_modules=_all(a), save_projection=False, projection_prng_key=7, bias="all"
        ),
        _scales,
    ),
    "loha": family(
        lambda a: peft.LoHaConfig(
            r=3, alpha=6, target_modules=_all(a), rank_pattern={"down_proj": 9}, init_weights=False
        ),
        normal(0.4),
    ),
    "lokr": family(
        lambda a: peft.LoKrConfig(
            r=2, alpha=3, target_modules=_all(a), alpha_pattern={"q_proj": 5}, init_weights=False
        ),
        normal(0.2),
    ),
    "lokr-both": family(
        lambda a: peft.LoKrConfig(
            r=2, alpha=4, target_modules=_all(a), decompose_both=True, decompose_factor=8
        ),
        normal(0.3),
    ),
    "lokr-whole": family(
        lambda a: peft.LoKrConfig(r=64, alpha=64, target_modules=attention(a)), normal(0.2)
    ),
    "ia3": family(
        lambda a: peft.IA3Config(
            target_modules=[*attention(a), *_feedforward(a)],
            feedforward_modules=_feedforward(a),
        ),
        normal(0.4, 1.0),
    ),
    "ia3-whole": family(
        lambda a: peft.IA3Config(
            target_modules=[*_feedforward(a), "lm_head"],
            feedforward_modules=r".*down_proj|.*mlp.c_proj",
            modules_to_save=_norms(a),
        ),
        around(),
    ),
    "ln-tuning": family(lambda a: peft.LNTuningConfig(target_modules=_norms(a)), around()),
    "beft": family(lambda a: peft.BeftConfig(target_modules=_all(a)), normal(0.2)),
    "bitfit": Family(_bitfit, lambda model, adapter: BiasOracle(load_plain(model), adapter)),
    "prompt-tuning": family(_prompt(peft.PromptTuningConfig), normal(0.5)),
    "p-tuning": family(_prompt(peft.PromptEncoderConfig, encoder_hidden_size=32), normal(0.3)),
    "multitask-prompt-tuning": Family(
        _add_task, lambda model, adapter: TaskOracle(load_plain(model), adapter)
    ),
    "cpt": family(
        lambda a: peft.CPTConfig(
            task_type="CAUSAL_LM", cpt_token_ids=[9, 30, 44], cpt_tokens_type_mask=[1, 2, 3]
        ),
        normal(0.5),
    ),
    "prefix-tuning": family(_prompt(peft.PrefixTuningConfig), normal(0.7)),
    "prompt-whole": family(
        lambda a: peft.PromptTuningConfig(
            task_type="CAUSAL_LM", num_virtual_tokens=2, modules_to_save=["lm_head", *_norms(a)]
        ),
        around(),
    ),
    "cartridge": family(_prompt(peft.CartridgeConfig, num_frozen_tokens=2), normal(0.7)),
    "prefix-projection": family(
        _prompt(peft.PrefixTuningConfig, prefix_projection=True, encoder_hidden_size=32),
        normal(0.4),
    ),
}
"""The other families, and variants that PEFT saves in another way."""
NOT_GPT2 = (
    # The tiny config has kv heads, which GPT-2 lacks.
    *("prefix-tuning", "prefix-projection", "cartridge"),
    # PEFT has no Conv1D of these.
    *("loha", "lokr", "lokr-both", "lokr-whole", "beft"),
    *("lora-whole", "qalora"),
)
"""Families that PEFT cannot save or run for the tiny GPT-2."""
