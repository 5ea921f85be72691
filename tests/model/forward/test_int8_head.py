"""Greedy steps by the 8-bit copy of the output layer: the tokens are those of the layer itself."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from adaplex.engine.batch import Batch, Chunk
from adaplex.engine.request import OVERFLOWED, AdapterMode, SamplingParams
from adaplex.engine.sequence import Sequence
from adaplex.model.forward.native_forward import NativeForward
from adaplex.model.kernels.native import instruction_sets
from adaplex.model.kernels.native.instruction_sets import InstructionSet
from adaplex.model.weights.int8_head import Int8Head
from instruction_sets import each_instruction_set
from peft_adapters import load_plain, save_adapter
from rig import ModelRig, lowered, prompt
from tiny import save_tiny

VOCABULARY, HIDDEN = 2000, 64
CANDIDATES = 64
"""Panels of a row beyond which its step computes all logits; see int8_head.h."""
ROWS = 19


def random_head(seed: int, rows: int = VOCABULARY, size: float = 0.12) -> Tensor:
    return torch.randn(rows, HIDDEN, generator=torch.Generator().manual_seed(seed)) * size


def nearly_equal(count: int, *, spread: float) -> Tensor:
    """Returns `count` rows that differ by less than the error of 8 bits: one large element makes
    their scales coarse.
    """
    rows = random_head(1, 1).repeat(count, 1) + random_head(2, count, spread)
    rows[:, 5] = 2.0
    return rows


def few_leaders(*, spread: float) -> Tensor:
    """Returns a head with 30 pairs of rows, x and -x, that lead all others in any direction, and in
    which they are nearly equal; each is in another panel.
    """
    head = random_head(3, size=0.01)
    leaders = nearly_equal(30, spread=spread)
    head[torch.arange(30) * 32 + 7] = leaders
    head[torch.arange(30) * 32 + 23] = -leaders
    return head


HEADS: dict[str, Callable[[], Tensor]] = {
    "random": lambda: random_head(0),
    "nearly equal": lambda: few_leaders(spread=3e-4),
    "equal": lambda: few_leaders(spread=0.0),
    "odd": lambda: few_leaders(spread=3e-4)[:333],
}


@pytest.fixture(scope="module")
def with_head(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Tensor], Path]:
    """Saves the tiny llama with another output layer."""

    def saved(head: Tensor) -> Path:
        model = save_tiny("llama", tmp_path_factory.mktemp("head"), vocab_size=len(head))
        file = model / "model.safetensors"
        tensors = load_file(file)
        assert tensors["lm_head.weight"].shape == head.shape
        save_file(tensors | {"lm_head.weight": head.contiguous()}, file, {"format": "pt"})
        return model

    return saved


def forward_of(rig: ModelRig) -> NativeForward:
    forward = rig.runner._forward
    assert isinstance(forward, NativeForward)
    return forward


def prompts(rig: ModelRig, rows: Iterable[int]) -> Batch:
    sequences = [rig.sequence(prompt(5 + row, seed=row)) for row in rows]
    return Batch(tuple(Chunk(each, 0, len(each)) for each in sequences))


@torch.inference_mode()
def screened(rig: ModelRig, batch: Batch) -> tuple[list[int], list[int]]:
    """Returns the tokens of a greedy step, and of how many panels each row's logits were computed:
    those of others still hold what the step found there.
    """
    forward = forward_of(rig)
    found = forward._logits_buffer(len(batch.sampling)).fill_(torch.nan)
    tokens = forward(batch, needs_logits=False)[1]
    computed = torch.nn.functional.pad(found.isnan(), (0, -found.shape[1] % 16), value=True)
    return tokens, (~computed).view(len(tokens), -1, 16).any(-1).sum(-1).tolist()


def tokens_of(rig: ModelRig, batch: Batch) -> list[int]:
    tokens: list[int] = rig.runner.forward(batch).argmax(-1).tolist()
    return tokens


def tokens_in_8_bits(with_head: Callable[[Tensor], Path], head: Tensor, dtype: str) -> list[int]:
    """Returns the tokens of a model whose output layer has the values of the copy."""
    stored = head.bfloat16().float() if dtype == "bf16" else head
    scale = stored.abs().amax(1, keepdim=True) / 127
    rig = ModelRig(with_head((stored / scale).round() * scale), "fp32")
    return tokens_of(rig, prompts(rig, range(ROWS)))


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("kind", HEADS)
@each_instruction_set
def test_tokens_are_those_of_the_layer(
    instructions: InstructionSet,
    kind: str,
    dtype: str,
    with_head: Callable[[Tensor], Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv(instruction_sets.VARIABLE, instructions.name)
    head = HEADS[kind]()
    rig = ModelRig(with_head(head), dtype, int8_head=True)
    expected = tokens_of(rig, prompts(rig, range(ROWS)))
    tokens, panels = screened(rig, prompts(rig, range(ROWS)))
    assert tokens == expected
    assert max(panels) <= CANDIDATES
    if kind == "random":
        assert max(panels) < VOCABULARY / 16 / 4
    else:  # the copy alone would choose otherwise
        assert min(panels) > 1
        assert kind == "equal" or tokens_in_8_bits(with_head, head, dtype) != expected
    for rows in (1, 2, 3, 7, 8):
        assert screened(rig, prompts(rig, range(rows))) == (expected[:rows], panels[:rows])
    assert screened(rig, prompts(rig, [ROWS - 1]))[0] == expected[-1:]


def test_too_many_candidates_are_decided_by_all_logits(
    with_head: Callable[[Tensor], Path],
) -> None:
    rig = ModelRig(with_head(nearly_equal(VOCABULARY, spread=3e-4)), "bf16", int8_head=True)
    tokens, panels = screened(rig, prompts(rig, range(5)))
    assert tokens == tokens_of(rig, prompts(rig, range(5)))
    assert panels == [VOCABULARY // 16] * 5


SAMPLINGS = (
    SamplingParams(),
    SamplingParams(temperature=0.9, top_p=0.9, seed=3),
    SamplingParams(logprobs=3),
    SamplingParams(repetition_penalty=1.3),
    SamplingParams(min_tokens=2, stop_token_ids=frozenset({11})),
)


def test_steps_that_need_logits_have_those_of_the_layer(
    with_head: Callable[[Tensor], Path],
) -> None:
    model = with_head(few_leaders(spread=3e-4))
    results = []
    for int8_head in (False, True):
        rig = ModelRig(model, "bf16", int8_head=int8_head)
        assert bool(rig.runner.int8_head_bytes) == int8_head
        sequences = [rig.sequence(prompt(9 + i), None, each) for i, each in enumerate(SAMPLINGS)]
        mixed = rig.runner.run(Batch(tuple(Chunk(s, 0, len(s)) for s in sequences)))
        alone = [rig.runner.run(Batch((Chunk(s, 0, len(s)),)))[0] for s in sequences]
        assert list(mixed) == alone
        results.append(alone)
    assert results[0] == results[1]


def test_steps_with_an_adapter_of_the_output_layer_read_the_layer(
    with_head: Callable[[Tensor], Path], tmp_path: Path
) -> None:
    model = with_head(few_leaders(spread=3e-4))
    rig = ModelRig(model, "bf16", int8_head=True)
    fields = {
        "other": {"target_modules": ["q_proj", "down_proj"]},
        "pair": {"target_modules": ["lm_head"]},
        "whole": {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
        "merged": {"target_modules": ["q_proj", "lm_head"]},
    }
    for name, each in fields.items():
        saved = save_adapter(load_plain(model), tmp_path / name, size=0.3, **each)
        program = replace(lowered(saved, rig.base.spec), digest=f"sha256:{name}")
        mode = AdapterMode.MERGED if name == "merged" else AdapterMode.UNMERGED
        ref = rig.add(program, mode)
        sequences: list[Sequence] = [rig.sequence(prompt(9), r) for r in (None, ref, None)]
        batch = Batch(tuple(Chunk(s, 0, len(s)) for s in sequences))
        tokens, panels = screened(rig, batch)
        logits = rig.runner.forward(batch)
        assert tokens == logits.argmax(-1).tolist()
        assert (logits[0] - logits[1]).abs().max() > 1e-2
        assert (max(panels) <= CANDIDATES) == (name == "other")


def test_a_row_that_is_not_finite_ends_alone(
    with_head: Callable[[Tensor], Path], tmp_path: Path
) -> None:
    model = with_head(few_leaders(spread=3e-4))
    rig = ModelRig(model, "bf16", int8_head=True)
    fields = {"target_modules": ["q_proj", "down_proj"], "size": 1e30}
    bad = rig.add(lowered(save_adapter(load_plain(model), tmp_path, **fields), rig.base.spec))
    sequences = [rig.sequence(prompt(9), each) for each in (None, bad, None)]
    batch = Batch(tuple(Chunk(s, 0, len(s)) for s in sequences))
    expected = tokens_of(rig, prompts(rig, [4]))[0]
    sequences[2].tokens[:] = prompt(9, seed=4)
    assert [each.token for each in rig.runner.run(batch)][1:] == [OVERFLOWED, expected]


@torch.inference_mode()
@pytest.mark.parametrize("value", [torch.nan, torch.inf, 1e38])
def test_one_activation_that_is_not_finite_or_huge_is_found(
    value: float, with_head: Callable[[Tensor], Path]
) -> None:
    rig = ModelRig(with_head(few_leaders(spread=3e-4)), "fp32", int8_head=True)
    forward = forward_of(rig)
    batch = prompts(rig, range(3))
    forward._shape.final_norm.weight[3] = value
    assert forward(batch, needs_logits=False)[1] == forward(batch)[1]
    assert value < torch.inf or set(forward(batch)[1]) == {-1}


@pytest.mark.parametrize("case", ["not finite", "modules"])
def test_a_base_without_a_copy_says_so(case: str, with_head: Callable[[Tensor], Path]) -> None:
    head = random_head(0, 320)
    head[7, 7] = torch.inf if case == "not finite" else 0.0
    lines: list[str] = []
    rig = ModelRig(with_head(head), "bf16", native=case != "modules", progress=lines.append)
    assert not any("8-bit" in line for line in lines)
    rig = ModelRig(
        *(with_head(head), "bf16"),
        **{"native": case != "modules", "int8_head": True, "progress": lines.append},
    )
    assert rig.runner.int8_head_bytes == 0
    assert any("head int8 has no effect" in line for line in lines)


@pytest.mark.parametrize("shape", [(320, 64), (333, 62), (16 * 300, 8)], ids=str)
def test_the_copy_bounds_its_errors(shape: tuple[int, int]) -> None:
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(7))
    weight[3], weight[5] = 0.0, 1e-38
    weight[9] *= 1e4
    rows, inputs = shape
    padded = torch.nn.functional.pad(weight, (0, 0, 0, -rows % 16))
    dense = padded.view(-1, 16, inputs // 2, 2).transpose(1, 2)
    head = Int8Head.of(dense, rows)
    assert head is not None
    codes = head.panels.permute(0, 3, 1, 2, 4).reshape(len(padded), -1)
    assert not codes[:, inputs:].any()
    assert int(codes.abs().max()) == 127
    scales, errors = head.scales.view(-1).double(), head.errors.view(-1).double()
    off = padded.double() - codes[:, :inputs] * scales[:, None]
    assert bool((off.norm(dim=1) <= errors + 1e-30).all())
    assert bool((off.abs().amax(1) <= 0.5005 * scales + 1e-30).all())
    assert head.longest >= float(weight.double().norm(dim=1).max())
    assert head.nbytes < weight.nbytes * 0.27 + 16 * 9 * inputs + 8 * rows
