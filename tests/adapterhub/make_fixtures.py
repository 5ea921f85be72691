"""Writes tests/adapterhub/fixtures: tiny models, adapters of AdapterHub's library, and its logits;
of the default model adapters and some logits only.

    make adapterhub-fixtures

The library pins a transformers that the project's environment cannot have, so it gets one of its
own under the XDG cache, and the fixtures are committed. Weights are rounded to bf16, sums are fp32.
"""

from __future__ import annotations

import copy
import os
import shutil
import subprocess
import sys
import venv
from pathlib import Path
from typing import Any

FIXTURES = Path(__file__).parent / "fixtures"
PACKAGES = ("torch==2.13.0", "adapters==1.3.0")
TOKENS = 24
VOCAB = 128
SIZES: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
DEFAULT = "smollm2-135m-instruct"
ADAPTED_LAYERS = (0, 14, 29)
"""Of the default model, so that its adapters are small."""
EVERY = 96
"""So many tokens of its vocabulary have one whose logit is kept."""


def main() -> None:
    """Writes the fixtures, in the library's environment."""
    if os.environ.get("ADAPTERHUB_ENVIRONMENT") != sys.prefix:
        _run_in(_environment())
        return
    import torch

    torch.set_num_threads(1)
    shutil.rmtree(FIXTURES, ignore_errors=True)
    for architecture in ("llama", "qwen2"):
        _write(architecture, FIXTURES / architecture)
    (default,) = (_cache() / "models").glob(f"{DEFAULT}-*")
    _write_default(default, FIXTURES / DEFAULT)


def _environment() -> Path:
    """The interpreter of the library's environment, made once."""
    folder = _cache() / "adapterhub-1.3.0"
    python = folder / "bin" / "python"
    if not python.exists():
        venv.create(folder, with_pip=True)
    subprocess.run([python, "-m", "pip", "install", "--quiet", *PACKAGES], check=True)
    return python


def _cache() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "adaplex"


def _run_in(python: Path) -> None:
    prefix = str(python.parent.parent)
    environment = os.environ | {"ADAPTERHUB_ENVIRONMENT": prefix, "PYTHONPATH": ""}
    subprocess.run([python, __file__], check=True, env=environment)


def _configs(architecture: str) -> dict[str, Any]:
    """Adapter name -> the library's config."""
    import adapters

    after_attention = {"mh_adapter": True, "output_adapter": False}
    configs: dict[str, Any] = {
        "houlsby": adapters.DoubleSeqBnConfig(reduction_factor=16),
        "pfeiffer": adapters.SeqBnConfig(
            reduction_factor={"0": 4, "default": 16}, non_linearity="gelu"
        ),
        "parallel": adapters.ParBnConfig(reduction_factor=8),
        "learned": adapters.ParBnConfig(
            reduction_factor=10, scaling="learned", mh_adapter=True, non_linearity="gelu_new",
            leave_out=[0],
        ),
        "channel": adapters.SeqBnConfig(
            reduction_factor=16, scaling="channel", mh_adapter=True, non_linearity="leakyrelu"
        ),
        "lora": adapters.LoRAConfig(r=4, alpha=6, intermediate_lora=True, attn_matrices=["q", "k"]),
        "dora": adapters.DoRAConfig(r=3, alpha=6, output_lora=True),
        "ia3": adapters.IA3Config(),
        "union": adapters.ConfigUnion(
            adapters.SeqBnConfig(reduction_factor=8, non_linearity="tanh", **after_attention),
            adapters.ParBnConfig(reduction_factor=16, non_linearity="sigmoid"),
            adapters.LoRAConfig(r=2, alpha=4, leave_out=[1]),
        ),
    }  # fmt: skip
    if architecture == "llama":  # others are adapted by an interface, which has neither
        configs["plus"] = adapters.AdapterPlusConfig(reduction_factor=16, stochastic_depth=0.0)
        configs["mam"] = adapters.MAMConfig(
            adapters.PrefixTuningConfig(prefix_length=5, bottleneck_size=8),
            adapters.ParBnConfig(reduction_factor=16),
        )
    return configs


def _write(architecture: str, folder: Path) -> None:
    """A random model, and what the library says with each adapter on it."""
    import torch
    from safetensors.torch import save_file
    from transformers import AutoConfig, AutoModelForCausalLM

    import adapters

    torch.manual_seed(0)
    config = AutoConfig.for_model(architecture, **SIZES)
    model: Any = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    for parameter in model.parameters():
        parameter.data.normal_(0, 0.12 if parameter.dim() > 1 else 0.3)
        if parameter.dim() == 1:
            parameter.data += 0.7
        parameter.data = parameter.data.bfloat16().float()
    copy.deepcopy(model).bfloat16().save_pretrained(folder / "model")
    tokens = torch.randint(3, VOCAB, [TOKENS])
    said = {"tokens": tokens, "base": _logits(model, tokens)}
    adapters.init(model)
    for name, method in _configs(architecture).items():
        said[name] = _adapted(model, name, method, tokens, folder)
    save_file(said, folder / "logits.safetensors")


def _write_default(directory: Path, folder: Path) -> None:
    """What the library says with bottlenecks on the default model, of the last token."""
    import torch
    from safetensors.torch import save_file
    from transformers import AutoConfig, AutoModelForCausalLM

    import adapters

    folder.mkdir()
    torch.manual_seed(0)
    config = AutoConfig.from_pretrained(directory)
    config.rope_theta = config.rope_parameters["rope_theta"]  # where newer transformers keeps it
    model: Any = AutoModelForCausalLM.from_pretrained(
        directory, config=config, torch_dtype=torch.float32, attn_implementation="eager"
    ).eval()
    others = [i for i in range(model.config.num_hidden_layers) if i not in ADAPTED_LAYERS]
    size = {"reduction_factor": 64, "leave_out": others}
    tokens = torch.randint(3, model.config.vocab_size, [TOKENS])
    said = {"tokens": tokens, "base": _logits(model, tokens)}
    adapters.init(model)
    for name, method in {
        "houlsby": adapters.DoubleSeqBnConfig(**size),
        "pfeiffer": adapters.SeqBnConfig(non_linearity="gelu", **size),
        "parallel": adapters.ParBnConfig(**size),
    }.items():
        said[name] = _adapted(model, name, method, tokens, folder)
    kept = {name: rows if name == "tokens" else rows[-1, ::EVERY] for name, rows in said.items()}
    save_file({k: rows.contiguous() for k, rows in kept.items()}, folder / "logits.safetensors")


def _adapted(model: Any, name: str, method: Any, tokens: Any, folder: Path) -> Any:
    """The logits with a random adapter, which is saved and taken off again."""
    model.add_adapter(name, config=method, set_active=True)
    _fill(model, name)
    model.eval()
    _save(model, folder / name, name)
    logits = _logits(model, tokens)
    model.set_active_adapters(None)
    model.delete_adapter(name)
    return logits


def _logits(model: Any, tokens: Any) -> Any:
    """[tokens, vocabulary], of the whole prompt at once."""
    import torch

    with torch.no_grad():
        return model(tokens[None], use_cache=False).logits[0].contiguous()


def _fill(model: Any, name: str) -> None:
    """Random values: around what is there where that is a scale or a magnitude."""
    import torch

    for key, parameter in model.named_parameters():
        if f".{name}." in key:
            scales = key.endswith((".scaling", ".m.weight"))
            if scales or (name == "ia3" and key.endswith(".lora_B")):
                parameter.data *= 1 + 0.3 * torch.randn_like(parameter)
            else:
                parameter.data.normal_(0, 0.15)


def _save(model: Any, folder: Path, name: str) -> None:
    """As the library does; it cannot write the tensors that prefixes share between layers."""
    import adapters.loading as loading
    from safetensors.torch import save_file

    loading.save_file = lambda tensors, path: save_file(
        {key: value for key, value in tensors.items() if ".self_attn.prefix_tuning." not in key},
        path,
    )
    model.save_adapter(folder, name, use_safetensors=True, with_head=False)


if __name__ == "__main__":
    main()
