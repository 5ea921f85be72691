"""An adapter of every family in one batch, on bases of every quantization; each of them on nf4
against PEFT on the same dequantized weights.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from adaplex.adapters.checkpoint import CONFIG, WEIGHTS, read_checkpoint
from adaplex.adapters.formats.bundle import bundle
from adaplex.adapters.limits import AdapterLimits
from adaplex.adapters.program.program import AdapterProgram
from adaplex.engine.request import AdapterMode, AdapterRef
from adaplex.engine.sequence import Sequence
from peft_adapters import Oracle, load_plain, save_adapter
from peft_families import FAMILIES, Family
from peft_kinds import save_kind
from rig import ModelRig, lowered
from tiny import byte_tokenizer

HUB = Path(__file__).parents[2] / "adapterhub" / "fixtures" / "llama"
INVOCATION = [5, 99]
EVERY = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
LORAS: dict[str, dict[str, Any]] = {
    "lora": {"target_modules": EVERY, "r": 5, "lora_bias": True},
    "dora": {"target_modules": EVERY, "use_dora": True},
    "qalora": {"target_modules": EVERY, "use_qalora": True, "qalora_group_size": 16},
    "alora": {"target_modules": EVERY, "alora_invocation_tokens": INVOCATION},
    "embedding": {"target_modules": ["embed_tokens", "lm_head", "q_proj"]},
    "saved": {"target_modules": ["v_proj"], "modules_to_save": ["embed_tokens", "lm_head", "norm"]},
    "tokens": {"target_modules": ["k_proj"], "trainable_token_indices": [7, 99, 3]},
}


def lora(**fields: Any) -> Family:
    """Returns a variant of LoRA as a Family."""
    return Family(
        lambda model, directory, seed: save_adapter(
            load_plain(model), directory, seed=seed, **fields
        ),
        lambda model, adapter: Oracle(load_plain(model), adapter),
    )


ALL = {**{name: lora(**fields) for name, fields in LORAS.items()}, **FAMILIES}
MERGED_ONLY = ("OFT", "HIRA")
BOTTLENECKS = ("houlsby", "pfeiffer", "parallel", "union")


def prompt_with_invocation(length: int, seed: int) -> list[int]:
    """Returns random tokens of the small vocabulary, and an invocation near the end."""
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randint(3, 127, (length,), generator=generator).tolist()
    return [*drawn, *INVOCATION, 7, 64]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The base that the bottleneck adapters of AdapterHub were made for."""
    directory = tmp_path_factory.mktemp("base") / "model"
    shutil.copytree(HUB / "model", directory)
    byte_tokenizer().save_pretrained(directory)
    return directory


@pytest.fixture(scope="module")
def directories(model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Name -> directory of an adapter, of every family."""
    work = tmp_path_factory.mktemp("adapters")
    made = {
        name: family.save(model, work / name, seed)
        for seed, (name, family) in enumerate(ALL.items())
    }
    for kind in MERGED_ONLY:
        save_kind(load_plain(model), work / kind, kind)
        made[kind] = work / kind
    hub = {f"hub-{name}": HUB / name for name in BOTTLENECKS}
    parts = [made["dora"], made["prefix-tuning"], hub["hub-houlsby"]]
    return made | hub | {"hybrid": bundled(parts, work / "hybrid")}


def bundled(parts: list[Path], into: Path) -> Path:
    """Writes one adapter of several families; returns its directory."""
    made = bundle([read_checkpoint(part, AdapterLimits()) for part in parts])
    into.mkdir()
    (into / CONFIG).write_text(json.dumps(made.config))
    save_file(dict(made.tensors), into / WEIGHTS)
    return into


@pytest.fixture(scope="module")
def rigs(model: Path) -> Callable[..., ModelRig]:
    return cache(lambda kind, dtype, native: ModelRig(model, kind, dtype, native=native))


@pytest.mark.parametrize(
    ("kind", "dtype", "native"),
    [
        ("fp32", "fp32", True),
        ("fp32", "fp32", False),
        ("bf16", "bf16", True),
        ("nf4", "bf16", True),
        ("int4-group", "bf16", True),
    ],
)
def test_rows_of_every_family_in_one_batch_have_the_bits_of_each_alone(
    kind: str, dtype: str, native: bool, rigs: Callable[..., ModelRig], directories: dict[str, Path]
) -> None:
    rig = rigs(kind, dtype, native)
    names = ["base", *directories, "base"]
    refs = {name: added(rig, lowered(path, rig.base.spec)) for name, path in directories.items()}
    prompts = [prompt_with_invocation(9 + 3 * i, seed=i) for i in range(len(names))]

    def sequences() -> list[Sequence]:
        return [
            rig.sequence(tokens, refs.get(name))
            for name, tokens in zip(names, prompts, strict=True)
        ]

    def steps(*rows: Sequence) -> list[Tensor]:
        """Logits [rows, vocabulary] after the prompts, and after two tokens each."""
        found = [rig.prefill(*rows).clone()]
        for token in (11, 7):
            for row in rows:
                row.tokens.append(token)
            found.append(rig.decode(*rows).clone())
        return found

    alone = [steps(sequence) for sequence in sequences()]
    together = steps(*sequences())
    backwards = steps(*sequences()[::-1])
    base = steps(*(rig.sequence(tokens) for tokens in prompts))
    for i, name in enumerate(names):
        for step in range(3):
            assert torch.equal(together[step][i], alone[i][step][0]), (name, step)
            assert torch.equal(backwards[step][-1 - i], alone[i][step][0]), (name, step)
            assert bool(torch.isfinite(together[step][i]).all()), name
        assert torch.equal(together[0][i], base[0][i]) == (name == "base"), name


def added(rig: ModelRig, program: AdapterProgram) -> AdapterRef:
    """Makes an adapter resident; merged if it can only be merged."""
    mode = AdapterMode.MERGED if program.traits.merged_only else AdapterMode.UNMERGED
    return rig.add(program, mode)


@pytest.fixture(scope="module")
def dequantized(
    model: Path, rigs: Callable[..., ModelRig], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """The base with the weights that nf4 gives it."""
    plain: Any = load_plain(model)
    for site, backend in rigs("nf4", "fp32", True).base.backends.items():
        plain.get_submodule(site).weight.data = backend.dequantize().clone()
    directory = tmp_path_factory.mktemp("dequantized") / "model"
    plain.save_pretrained(directory)
    config = json.loads((directory / "config.json").read_text())
    assert config["model_type"] == "llama"
    return directory


@pytest.mark.parametrize("name", ALL)
def test_a_family_on_nf4_equals_peft_on_the_dequantized_base(
    name: str, rigs: Callable[..., ModelRig], directories: dict[str, Path], dequantized: Path
) -> None:
    tokens = prompt_with_invocation(30, seed=1)
    expected = ALL[name].oracle(dequantized, directories[name]).logits(tokens)
    for dtype in ("fp32", "bf16"):
        rig = rigs("nf4", dtype, True)
        ref = rig.add(lowered(directories[name], rig.base.spec))
        got = rig.prefill(rig.sequence(tokens, ref))[0]
        if dtype == "fp32":
            assert (got - expected).abs().max() < 1e-4 * expected.abs().max()
        else:
            apart = torch.log_softmax(got, 0) - torch.log_softmax(expected, 0)
            assert float(apart.square().mean().sqrt()) < 2e-2 * float(expected.abs().max())
