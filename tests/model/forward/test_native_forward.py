"""NativeForward, a step in one C call, against TorchForward, over mixes of adapters."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from adaplex.adapters.program.program import AdapterProgram
from adaplex.engine.batch import Batch, Chunk
from adaplex.engine.request import OVERFLOWED, AdapterMode
from adaplex.engine.sequence import Sequence
from adaplex.model.forward import native_forward
from adaplex.model.forward.native_forward import NativeForward
from adaplex.model.forward.torch_forward import TorchForward
from adaplex.model.kernels.native import instruction_sets, structs
from adaplex.model.kernels.native.instruction_sets import InstructionSet
from adaplex.model.kernels.native.kernels import NativeKernels
from instruction_sets import each_instruction_set
from model.spread_adapters import spread_adapters
from peft_adapters import Oracle, load_plain, save_adapter, spread
from rig import ModelRig, lowered, prompt
from tiny import ARCHITECTURES, save_tiny
from two_forwards import (
    BOUNDS,
    LLAMAS,
    OTHER_SHAPES,
    both,
    close,
    decode,
    each_shape,
    forward_of,
)

ROWS = 12


def mixes(adapters: int) -> dict[str, list[int | None]]:
    """Name -> adapter of each sequence, None for base rows; not sorted."""
    chance = random.Random(5)
    zipf = [min(int(1 / (1 - chance.random())) - 1, adapters - 1) for _ in range(ROWS - 2)]
    return {
        "distinct": [None, *range(adapters), None],
        "identical": [None, *[1] * (ROWS - 1)],
        "uniform": [*(i % adapters for i in range(ROWS - 1)), None],
        "skewed": [2, 2, 2, 2, None, 2, 2, 2, 0, 2, None, 4],
        "zipf": [*sorted(zipf), None, zipf[0]],
    }


def spread_programs(model: Path, rig: ModelRig, architecture: str) -> list[AdapterProgram]:
    """Returns adapters of mixed ranks, targets and biases for the base of `rig`."""
    return [each.program for each in spread_adapters(model, rig.base.spec, architecture).values()]


@each_shape(*LLAMAS, exact=False)
def test_a_step_in_one_call_equals_the_modules_over_mixes(
    architecture: str, quantization: str, tiny_model: Callable[[str], Path]
) -> None:
    model = tiny_model(architecture)
    fast, slow = both(model, quantization)
    programs = spread_programs(model, slow, architecture)
    merged = {1, 5}
    modes = [
        AdapterMode.MERGED if i in merged else AdapterMode.UNMERGED for i in range(len(programs))
    ]
    refs = [
        [rig.add(program, mode) for program, mode in zip(programs, modes, strict=True)]
        for rig in (fast, slow)
    ]
    for mix in mixes(len(programs)).values():
        used = [[None if i is None else each[i] for i in mix] for each in refs]
        expected = decode(slow, used[1], None)
        got = decode(fast, used[0], expected)
        for one, other in zip(got, expected, strict=True):
            assert close(one, other, quantization, architecture)
        idle = fast.prefill(fast.sequence(prompt(9 + 5)))[0]
        if mix[1] is not None:
            assert (got[0][1] - idle).abs().max() > 1e-2


@each_shape(*LLAMAS)
def test_long_prompts_in_chunks_equal_the_modules(
    architecture: str, quantization: str, tiny_model: Callable[[str], Path]
) -> None:
    fast, slow = both(tiny_model(architecture), quantization)
    lengths = (300, 25, 16, 17, 1, 130)
    expected = slow.prefill(*(slow.sequence(prompt(n)) for n in lengths))
    sequences = [fast.sequence(prompt(n)) for n in lengths]
    whole = fast.prefill(*sequences)
    assert close(whole, expected, quantization, architecture)
    for row, sequence in zip(whole, sequences, strict=True):
        for start in range(0, len(sequence), 37):
            last = fast.forward(Chunk(sequence, start, min(37, len(sequence) - start)))
        assert torch.equal(last[0], row)


@pytest.mark.parametrize("quantization", ["fp32", "bf16"])
def test_odd_sizes_equal_the_modules(quantization: str, tmp_path: Path) -> None:
    sizes = {"hidden_size": 76, "intermediate_size": 258, "vocab_size": 333}
    model = save_tiny("llama", tmp_path / "model", **sizes)
    fast, slow = both(model, quantization)
    program = spread_programs(model, slow, "llama")[2]
    for count in (1, 3, 9):
        refs = [[rig.add(program) if i % 2 else None for i in range(count)] for rig in (fast, slow)]
        expected = decode(slow, refs[1], None)
        for one, other in zip(decode(fast, refs[0], expected), expected, strict=True):
            assert close(one, other, quantization)


@pytest.mark.parametrize("quantization", ["fp32", "bf16", "nf4", "int4-group"])
@each_instruction_set
def test_every_instruction_set_equals_the_modules(
    instructions: InstructionSet,
    quantization: str,
    tiny_model: Callable[[str], Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv(instruction_sets.VARIABLE, instructions.name)
    model = tiny_model("llama")
    fast, slow = both(model, quantization)
    programs = spread_programs(model, slow, "llama")
    refs = [[None, *(rig.add(program) for program in programs)] for rig in (fast, slow)]
    expected = decode(slow, refs[1], None)
    for one, other in zip(decode(fast, refs[0], expected), expected, strict=True):
        assert close(one, other, quantization)
    alone = fast.prefill(fast.sequence(prompt(20), refs[0][1]))[0]
    assert torch.equal(fast.prefill(*(fast.sequence(prompt(20), r) for r in refs[0]))[1], alone)


@pytest.mark.parametrize("quantization", sorted(BOUNDS))
def test_threads_change_no_bit(
    quantization: str,
    tiny_model: Callable[[str], Path],
    use_threads: Callable[[NativeKernels, int], None],
) -> None:
    model = tiny_model("qwen2")
    rig = ModelRig(model, quantization)
    assert rig.base.kernels is not None
    programs = spread_programs(model, rig, "qwen2")
    refs = [None, *(rig.add(program) for program in programs)]
    alone = decode(rig, refs, None)
    for count in (2, 3):
        use_threads(rig.base.kernels, count)
        for one, other in zip(decode(rig, refs, None), alone, strict=True):
            assert torch.equal(one, other)


@pytest.mark.parametrize(
    ("architecture", "expected"),
    [
        *((name, NativeForward) for name in (*LLAMAS, *OTHER_SHAPES)),
        *((name, TorchForward) for name in ("mixtral", "gpt_oss")),
    ],
)
def test_bases_of_known_shapes_run_in_one_call(
    architecture: str, expected: type[Any], tiny_model: Callable[[str], Path]
) -> None:
    for quantization in ("fp32", "nf4"):
        assert forward_of(ModelRig(tiny_model(architecture), quantization)) is expected


LIKE_LLAMA: dict[str, Any] = {
    "embedding_multiplier": 1.0,
    "attention_multiplier": 0.25,
    "residual_multiplier": 1.0,
    "logits_scaling": 1.0,
}
"""Factors of granite, which is built of llama's parts, with the values that llama has."""


@pytest.mark.parametrize(
    ("changed", "expected"),
    [
        ({}, NativeForward),
        ({"attention_multiplier": 0.1}, NativeForward),
        ({"embedding_multiplier": 6.0}, TorchForward),
        ({"residual_multiplier": 0.5}, TorchForward),
        ({"logits_scaling": 4.0}, TorchForward),
    ],
    ids=lambda value: "".join(value) if isinstance(value, dict) else None,
)
def test_the_trial_finds_parts_that_are_combined_otherwise(
    changed: dict[str, Any],
    expected: type[Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(ARCHITECTURES, "granite", {})
    model = save_tiny("granite", tmp_path / "model", **LIKE_LLAMA | changed)
    rig = ModelRig(model)
    assert forward_of(rig) is expected
    logits = Oracle(load_plain(model), None).logits(prompt(30))
    assert (rig.prefill(rig.sequence(prompt(30)))[0] - logits).abs().max() < 1e-4


FAR = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 64,
}
BY_LENGTH = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "short_factor": [1.0] * 8,
    "long_factor": [2.0] * 8,
    "original_max_position_embeddings": 64,
}


@pytest.mark.parametrize(
    ("architecture", "changes", "expected"),
    [
        ("llama", {"rope_parameters": FAR}, NativeForward),
        ("ministral3", {"rope_parameters": FAR | {"llama_4_scaling_beta": 0.5}}, TorchForward),
        ("smollm3", {"num_hidden_layers": 4}, TorchForward),
        ("seed_oss", {}, NativeForward),
        ("phi3", {"rope_parameters": BY_LENGTH}, TorchForward),
        ("gemma2", {"hidden_activation": "quick_gelu"}, TorchForward),
    ],
)
def test_what_a_short_trial_cannot_show_is_found_in_the_settings(
    architecture: str,
    changes: dict[str, Any],
    expected: type[Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(ARCHITECTURES, architecture, {})
    model = save_tiny(architecture, tmp_path / "model", **changes)
    rig = ModelRig(model)
    assert forward_of(rig) is expected
    logits = Oracle(load_plain(model), None).logits(prompt(200))
    assert (rig.prefill(rig.sequence(prompt(200)))[0] - logits).abs().max() < 1e-4


def test_a_trial_that_disagrees_leaves_the_modules_in_place(
    tiny_model: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(native_forward, "TOLERANCE", 0.0)
    rig = ModelRig(tiny_model("llama"))
    assert forward_of(rig) is TorchForward


def test_a_width_without_panels_runs_by_modules_and_merges(tmp_path: Path) -> None:
    model = save_tiny("llama", tmp_path / "model", intermediate_size=129)
    rig, plain = ModelRig(model, "bf16"), ModelRig(model, "bf16", native=False)
    assert forward_of(rig) is TorchForward
    program = spread_programs(model, rig, "llama")[1]
    rows = [
        r.prefill(r.sequence(prompt(20), r.add(program, AdapterMode.MERGED))) for r in (rig, plain)
    ]
    assert close(rows[0], rows[1], "bf16")


@pytest.mark.parametrize("quantization", sorted(BOUNDS))
@pytest.mark.parametrize("size", [1e4, 1e30])
def test_an_overflow_stays_in_its_rows_and_leaves_its_blocks_clean(
    size: float, quantization: str, tiny_model: Callable[[str], Path], tmp_path: Path
) -> None:
    model = tiny_model("llama")
    rig = ModelRig(model, quantization)
    fields = spread("llama")["bias-lora"]
    bad, good = (
        rig.add(
            lowered(
                save_adapter(load_plain(model), tmp_path / str(i), seed=i, size=each, **fields),
                rig.base.spec,
            )
        )
        for i, each in enumerate((size, 0.1))
    )
    lengths, refs = (20, 33, 20), (None, bad, good)
    alone = [rig.prefill(rig.sequence(prompt(n), r))[0] for n, r in zip(lengths, refs, strict=True)]
    sequences = [rig.sequence(prompt(n), r) for n, r in zip(lengths, refs, strict=True)]
    batch = Batch(tuple(Chunk(s, 0, len(s)) for s in sequences))
    tokens = [each.token for each in rig.runner.run(batch)]
    together = rig.forward(*batch.chunks)
    if size > 1e20:
        assert tokens[1] == OVERFLOWED
    for row in (0, 2):
        assert torch.equal(together[row], alone[row])
        assert tokens[row] == int(alone[row].argmax())
    heir = rig.sequence(prompt(21), None)
    heir.blocks = sequences[1].blocks
    clean = rig.prefill(rig.sequence(prompt(21), None))
    assert bool(torch.isfinite(clean).all())
    assert torch.equal(rig.prefill(heir), clean)


def last_token(value: int) -> Callable[[Sequence], None]:
    return lambda sequence: sequence.tokens.__setitem__(-1, value)


def second_block(value: int) -> Callable[[Sequence], None]:
    return lambda sequence: sequence.blocks.__setitem__(1, value)


@pytest.mark.parametrize(
    ("tamper", "message"),
    [
        (last_token(-1), "a token is not in the vocabulary"),
        (last_token(320), "a token is not in the vocabulary"),
        (second_block(-1), "a block is not in the cache"),
        (second_block(64), "a block is not in the cache"),
    ],
)
def test_a_step_that_leads_out_of_the_model_is_refused(
    tamper: Callable[[Sequence], None], message: str, tiny_model: Callable[[str], Path]
) -> None:
    rig = ModelRig(tiny_model("llama"), num_blocks=64)
    good, bad = rig.sequence(prompt(20)), rig.sequence(prompt(20))
    expected = rig.prefill(good)
    tamper(bad)
    with pytest.raises(ValueError, match=message):
        rig.prefill(good, bad)
    assert torch.equal(rig.prefill(good), expected)


def test_a_position_beyond_the_cache_is_refused(tiny_model: Callable[[str], Path]) -> None:
    rig = ModelRig(tiny_model("llama"), num_blocks=8)
    sequence = rig.sequence(prompt(129))
    with pytest.raises(ValueError, match="a position is out of range"):
        rig.prefill(sequence)


@pytest.mark.parametrize("field", ["rows", "sequences", "wanted_rows", "runs", "head_runs"])
@pytest.mark.parametrize("by", [-1, -2])
def test_rows_that_are_not_covered_are_refused(
    field: str, by: int, tiny_model: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    rig = ModelRig(tiny_model("llama"))
    assert rig.base.kernels is not None
    forward = rig.base.kernels.forward

    def tampered(model: structs.Model, step: structs.Step) -> None:
        setattr(step, field, getattr(step, field) + by)
        forward(model, step)

    monkeypatch.setattr(rig.base.kernels, "forward", tampered)
    with pytest.raises(ValueError, match="rows, runs or sequences do not cover the step"):
        rig.prefill(rig.sequence(prompt(5)), rig.sequence(prompt(3)))
