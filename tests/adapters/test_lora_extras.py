"""Everything that PEFT's LoRA holds besides pairs of linears, by whole logits against PEFT."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import TrainableTokensConfig, get_peft_model
from torch import Tensor

from adaplex.adapters import formats
from adaplex.adapters.checkpoint import Checkpoint, read_checkpoint
from adaplex.adapters.errors import AdapterInvalid
from adaplex.adapters.limits import AdapterLimits
from adaplex.adapters.program.program import AdapterProgram
from peft_adapters import EXPERTS, EXTRAS, Oracle, load_plain, pool_linears, save_adapter
from primitives import applied, describe
from rig import prompt
from tiny import save_tiny

LIMITS = AdapterLimits()


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Architecture and whether its ends are tied -> directory of a tiny random model."""

    @cache
    def directory(architecture: str, *, tied: bool = False) -> Path:
        where = tmp_path_factory.mktemp(architecture) / "tiny"
        return save_tiny(architecture, where, tie_word_embeddings=tied)

    return directory


def lower(directory: Path, base: Any, **changes: Any) -> AdapterProgram:
    spec = describe(base, **changes)
    return formats.lower(read_checkpoint(directory, LIMITS), spec, LIMITS)


@torch.no_grad()
def logits(base: Any, program: AdapterProgram, tokens: list[int], start: int = 0) -> Tensor:
    with applied(base, program, start):
        found: Tensor = base(torch.tensor([tokens])).logits[0, -1]
    return found


@pytest.mark.parametrize(
    ("case", "tied", "architecture"),
    [
        (case, tied, ("llama", "qwen2")[(index + tied) % 2])
        for index, case in enumerate(EXTRAS)
        for tied in (False, True)
    ],
)
def test_logits_are_pefts(
    case: str, tied: bool, architecture: str, model: Callable[..., Path], tmp_path: Path
) -> None:
    tiny = model(architecture, tied=tied)
    fields = {"r": 4, "lora_alpha": 6} | EXTRAS[case]
    directory = save_adapter(load_plain(tiny), tmp_path, **fields)
    base = load_plain(tiny)
    program = lower(directory, base)
    tokens = [*prompt(12), 9, 4, 7]
    expected = Oracle(load_plain(tiny), directory).logits(tokens)
    plain = base(torch.tensor([tokens])).logits[0, -1]
    assert (expected - plain).abs().max() > 1e-2, "does nothing"
    assert (logits(base, program, tokens) - expected).abs().max() < 1e-4
    assert torch.equal(base(torch.tensor([tokens])).logits[0, -1], plain)


@pytest.mark.parametrize("case", EXPERTS)
def test_experts_are_pefts(case: str, model: Callable[..., Path], tmp_path: Path) -> None:
    tiny = model("mixtral")
    fields = {"r": 3, "lora_alpha": 6, "target_modules": []} | EXPERTS[case]
    directory = save_adapter(load_plain(tiny), tmp_path, **fields)
    base, tokens = load_plain(tiny), prompt(15)
    program = lower(directory, base)
    expected = Oracle(load_plain(tiny), directory).logits(tokens)
    plain = base(torch.tensor([tokens])).logits[0, -1]
    assert (expected - plain).abs().max() > 1e-2, "does nothing"
    assert (logits(base, program, tokens) - expected).abs().max() < 1e-4


INVOCATION = [30, 31, 30, 31, 33]


@pytest.mark.parametrize("at", [[5], [3, 11], []], ids=["once", "twice", "never"])
def test_activated_lora_is_pefts(at: list[int], model: Callable[..., Path], tmp_path: Path) -> None:
    tiny = model("llama")
    directory = save_adapter(
        load_plain(tiny),
        tmp_path,
        r=4,
        lora_alpha=8,
        target_modules=["q_proj", "up_proj"],
        lora_bias=True,
        alora_invocation_tokens=INVOCATION,
    )
    base, tokens = load_plain(tiny), prompt(20)
    for start in at:
        tokens[start : start + len(INVOCATION)] = INVOCATION
    program = lower(directory, base)
    assert (program.family, program.invocation) == ("alora", tuple(INVOCATION))
    expected = Oracle(load_plain(tiny), directory).logits(tokens)
    found = logits(base, program, tokens, start=max(at, default=len(tokens)))
    assert (found - expected).abs().max() < 1e-4
    everywhere = logits(base, program, tokens)
    assert (everywhere - expected).abs().max() > 1e-2


@pytest.mark.parametrize("group", [8, 32])
def test_qalora_is_pefts(
    group: int,
    model: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    pool_linears(monkeypatch)
    tiny = model("llama")
    fields = {"r": 4, "lora_alpha": 6, "target_modules": ["q_proj", "down_proj"]}
    directory = save_adapter(
        load_plain(tiny), tmp_path, use_qalora=True, qalora_group_size=group, **fields
    )
    base, tokens = load_plain(tiny), prompt(15)
    program = lower(directory, base)
    assert program.family == "qalora"
    assert {m.low_rank.group for m in program.modules if m.low_rank is not None} == {group}
    (note,) = program.notes
    assert f"by PEFT: averages over {group} inputs" in note
    expected = Oracle(load_plain(tiny), directory).logits(tokens)
    assert (logits(base, program, tokens) - expected).abs().max() < 1e-4


def test_qalora_by_its_authors_averages_only(
    model: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    pool_linears(monkeypatch)
    tiny = model("llama")
    save_adapter(
        load_plain(tiny), tmp_path, r=4, target_modules=["q_proj"], use_qalora=True,
        qalora_group_size=16,
    )  # fmt: skip
    written = read_checkpoint(tmp_path, LIMITS)
    spec = describe(load_plain(tiny))
    theirs = formats.lower(written, spec, LIMITS)
    config = {
        name: value
        for name, value in written.config.items()
        if name not in ("use_qalora", "qalora_group_size")
    }
    for field in ("group_size", "qalora_group_size"):
        ours = formats.lower(Checkpoint(config | {field: 16}, written.tensors), spec, LIMITS)
        assert "by its authors: averages over 16 inputs" in ours.notes[0]
        for own, other in zip(ours.modules, theirs.modules, strict=True):
            assert own.low_rank is not None
            assert other.low_rank is not None
            x = torch.randn(5, 64)
            averages = x.reshape(5, 4, 16).mean(2)
            a = written.tensors[f"base_model.model.{own.module}.lora_A.weight"]
            b = written.tensors[f"base_model.model.{own.module}.lora_B.weight"]
            expected = averages @ a.T @ b.T * (8 / 4)
            found = x @ own.low_rank.a.T @ own.low_rank.b.T
            torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
            torch.testing.assert_close(other.low_rank.b, own.low_rank.b * 4)
    with pytest.raises(AdapterInvalid, match=r"expected \[4, 64\]"):
        formats.lower(Checkpoint(config, written.tensors), spec, LIMITS)
    unused = config | {"use_qalora": False, "qalora_group_size": 16}
    with pytest.raises(AdapterInvalid, match=r"expected \[4, 64\]"):
        formats.lower(Checkpoint(unused, written.tensors), spec, LIMITS)


BOTH = ["embed_tokens", "lm_head"]


@pytest.mark.parametrize(
    ("tied", "targets"),
    [
        (tied, targets)
        for tied in (False, True)
        for targets in (None, ["embed_tokens"], ["lm_head"], BOTH)
        if not (tied and targets is BOTH)  # PEFT wraps the output layer twice, and cannot run it
    ],
)
def test_trainable_tokens_are_pefts(
    targets: list[str] | None, tied: bool, model: Callable[..., Path], tmp_path: Path
) -> None:
    tiny = model("llama", tied=tied)
    config = TrainableTokensConfig(
        task_type="CAUSAL_LM", token_indices=[40, 7, 21], target_modules=targets
    )
    tuned = get_peft_model(load_plain(tiny), config)
    torch.manual_seed(1)
    for name, parameter in tuned.named_parameters():
        if "trainable_tokens_delta" in name:
            parameter.data += torch.randn_like(parameter)
    tuned.save_pretrained(tmp_path)
    base, tokens = load_plain(tiny), [40, 50, 7, 60]
    program = lower(tmp_path, base)
    assert program.family == "trainable-tokens"
    expected = Oracle(load_plain(tiny), tmp_path).logits(tokens)
    plain = base(torch.tensor([tokens])).logits[0, -1]
    assert (expected - plain).abs().max() > 1e-2, "does nothing"
    assert (logits(base, program, tokens) - expected).abs().max() < 1e-4
