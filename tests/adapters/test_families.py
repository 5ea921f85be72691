"""What families make of a checkpoint; how it answers is held against PEFT elsewhere."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import VeraConfig, get_peft_model
from safetensors.torch import save
from torch import nn

from adaplex.adapters import formats
from adaplex.adapters.checkpoint import CONFIG, WEIGHTS, read_checkpoint
from adaplex.adapters.errors import AdapterInvalid
from adaplex.adapters.formats.peft.vera import random_projections
from adapters.handmade import DOWN, HIDDEN, PREFIX, QUERY, write
from adapters.small_families import (
    BASE,
    FEATURES,
    HEADS,
    LIMITS,
    MADE,
    at,
    base_of,
    loha,
    lower,
    ones,
    refusals,
)


@pytest.mark.parametrize("kind", MADE)
def test_each_small_adapter_is_lowered(kind: str) -> None:
    program = lower(kind)
    assert program.family == formats.FORMATS[kind].family
    assert program.modules
    assert [m.module for m in program.modules] == sorted(m.module for m in program.modules)
    assert kind not in formats.NEEDS


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
    assert found == {"rank_pattern": "prunes all ranks of all modules: nothing would change"}


@pytest.mark.parametrize(("rank", "wide", "tall"), [(2, 16, 8), (7, 33, 65)])
def test_vera_draws_what_peft_draws(rank: int, wide: int, tall: int) -> None:
    model = nn.Sequential(nn.Linear(wide, tall))
    config = VeraConfig(r=rank, target_modules=["0"], projection_prng_key=5)
    tuned: Any = get_peft_model(model, config)
    a, b = random_projections(5, rank, wide, tall)
    assert torch.equal(a, tuned.base_model.vera_A["default"])
    assert torch.equal(b, tuned.base_model.vera_B["default"])


@pytest.mark.parametrize(("r", "rank"), [(1, 1), (2, 4), (3, 8), (8, 8)])
def test_loha_takes_the_smaller_of_its_exact_pairs(r: int, rank: int) -> None:
    weights = at(QUERY, **loha(HIDDEN, HIDDEN, r)) | dict.fromkeys(MADE["LOHA"][1])
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
    assert program.prefix_tokens == program.traits.leading == 3
    for layer, module in enumerate(program.modules):
        assert module.module == f"model.layers.{layer}.self_attn"
        assert module.prefix is not None
        cut = saved.view(3, 4, HEADS, FEATURES)
        assert torch.equal(module.prefix.keys, cut[:, 2 * layer])
        assert torch.equal(module.prefix.values, cut[:, 2 * layer + 1])


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
