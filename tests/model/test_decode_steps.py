"""Whole models on the kernels of CUDA devices, interpreted on a CPU: against the reference, and
decoding that is replayed while adapters come and go."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from adaplex.adapters.program import AdapterProgram, LowRank, ModuleProgram
from adaplex.engine.batch import Chunk
from adaplex.engine.request import AdapterMode, AdapterRef
from adaplex.engine.sequence import Sequence
from adaplex.model.decode_steps import DecodeSteps, Replay
from peft_adapters import everything, load_plain, save_adapter
from rig import BLOCK, Rig, lowered, prompt

RANKS = (1, 3, 8, 16)
pytestmark = pytest.mark.usefixtures("row_by_row")


class Recorded:
    """A capture that counts: what was captured is never built again, only run again."""

    def __init__(self) -> None:
        self.captured = 0
        self.runs = 0

    def __call__(self, step: Replay) -> Replay:
        self.captured += 1

        def run() -> Tensor:
            self.runs += 1
            return step()

        return run


def made(rig: Rig, rank: int, seed: int, *, bias: bool = False) -> AdapterProgram:
    """A random adapter on every linear of the decoder layers."""
    random = torch.Generator().manual_seed(seed)
    modules = []
    for name, module in sorted(rig.base.spec.modules.items()):
        if module.kind == "linear" and "layers" in name:
            a = torch.randn(rank, module.in_features, generator=random) * 0.2
            b = torch.randn(module.out_features, rank, generator=random) * 0.2
            shift = torch.randn(module.out_features, generator=random) if bias else None
            modules.append(ModuleProgram(name, LowRank(a, b), shift))
    return AdapterProgram(f"sha256:{rank}-{seed}-{bias}", "lora", tuple(modules))


def recorded(rig: Rig, *, max_rank: int = 64) -> Recorded:
    """Counts the captures and replays of a rig from now on."""
    capture, forward = Recorded(), rig.runner._forward
    forward._decode = DecodeSteps(
        rig.base, forward._low_rank, block_tokens=BLOCK, max_rank=max_rank, capture=capture
    )
    return capture


def decode(rig: Rig, sequences: list[Sequence]) -> Tensor:
    """One step of rows that have one token to compute."""
    return rig.forward(*(Chunk(s, len(s) - 1, 1) for s in sequences))


@pytest.fixture
def model(tiny_model: Callable[[str], Path]) -> Path:
    return tiny_model("llama")


@pytest.fixture
def rigs(model: Path) -> tuple[Rig, Rig]:
    """Triton's kernels, and the reference."""
    return Rig(model, triton=True), Rig(model, native=False)


@pytest.mark.parametrize("architecture", ["llama", "gemma2", "gpt_oss", "gpt2"])
def test_a_mixed_batch_equals_the_reference(
    architecture: str, tiny_model: Callable[[str], Path], tmp_path: Path
) -> None:
    model, outputs, logits = tiny_model(architecture), [], []
    linears = ["q_proj", "o_proj"] if architecture == "gpt_oss" else everything(architecture)
    for i, rank in enumerate(RANKS[1:]):
        fields = {"r": rank, "lora_alpha": rank, "target_modules": linears}
        save_adapter(load_plain(model), tmp_path / str(rank), seed=i, **fields)
    for rig in (Rig(model, triton=True), Rig(model, native=False)):
        programs = [lowered(tmp_path / str(rank), rig.base.spec) for rank in RANKS[1:]]
        adapters = [rig.add(program) for program in programs]
        chosen = [None, adapters[0], adapters[1], adapters[1], adapters[2]]
        rows = [rig.sequence(prompt(9 + 7 * i, seed=i), a) for i, a in enumerate(chosen)]
        logits.append(rig.prefill(*rows))
        outputs.append(rig.generate(rows, 3))
        logits.append(decode(rig, rows))
    assert (logits[0] - logits[2]).abs().max() < 1e-4
    assert (logits[1] - logits[3]).abs().max() < 1e-4
    assert outputs[0] == outputs[1]


def test_replays_are_exact_while_adapters_come_and_go(rigs: tuple[Rig, Rig]) -> None:
    """Adapters replace each other in the arena's bytes and in the kernel's table; one capture."""
    fast, slow = rigs
    capture = recorded(fast)
    programs = [made(fast, rank, seed) for seed, rank in enumerate([*RANKS, 8, 8])]
    extent = max(p.packed_bytes(4) for p in programs)
    tokens = [prompt(12, seed=i) for i in range(4)]
    lone: dict[tuple[int, int], Tensor] = {}

    def run(rig: Rig, places: dict[int, int], rows: list[int | None]) -> Tensor:
        """Loads programs into extents (place -> program), decodes the rows, unloads them."""
        for place, which in places.items():
            rig.programs[programs[which].digest] = programs[which]
            rig.runner.load_adapter(programs[which].digest, place * extent, extent)
        sequences = []
        for i, which in enumerate(rows):
            digest = None if which is None else programs[which].digest
            adapter = digest and AdapterRef("a", 1, digest, extent, 1, AdapterMode.UNMERGED)
            sequences.append(rig.sequence(tokens[i], adapter or None))
        rig.prefill(*sequences)
        for sequence in sequences:
            sequence.tokens.append(5)
        logits = decode(rig, sequences)
        for which in places.values():
            rig.runner.remove_adapter(programs[which].digest)
        return logits

    first = run(fast, {0: 0, 1: 3}, [None, 0, 3, 3])
    for places, rows in [
        ({0: 0, 1: 3}, [None, 0, 3, 3]),
        ({0: 4, 1: 5}, [4, 4, 5, None]),
        ({0: 5, 1: 4}, [4, 4, 5, None]),
        ({1: 1}, [1, None, None, 1]),
        ({0: 2, 1: 1, 2: 0, 3: 4}, [2, 1, 0, 4]),
    ]:
        got = run(fast, places, rows)
        assert (got - run(slow, places, rows)).abs().max() < 1e-4
        for row, which in enumerate(rows):
            if which is not None:
                known = lone.setdefault((row, which), got[row])
                assert torch.equal(got[row], known)
    assert torch.equal(run(fast, {0: 0, 1: 3}, [None, 0, 3, 3]), first)
    assert not torch.equal(first[1], run(fast, {}, [None] * 4)[1])
    assert capture.captured == 2, "one with adapters, one without"
    assert capture.runs == 8


def test_rows_are_padded_to_powers_of_two_without_harm(rigs: tuple[Rig, Rig]) -> None:
    fast, _ = rigs
    adapter = fast.add(made(fast, 8, 0))
    rows = [fast.sequence(prompt(10, seed=i), adapter if i % 2 else None) for i in range(5)]
    fast.prefill(*rows)
    for sequence in rows:
        sequence.tokens.append(7)
    capture = recorded(fast)
    together = decode(fast, rows)
    assert capture.captured == 1
    for count in (1, 2, 3, 4):
        assert torch.equal(decode(fast, rows[:count]), together[:count])
    assert torch.equal(decode(fast, rows[3:]), together[3:])
    # One row and it alone without an adapter, two rows, four rows, eight rows.
    assert capture.captured == 4
    assert capture.runs == 6


def test_long_contexts_have_wider_tables(rigs: tuple[Rig, Rig]) -> None:
    capture = recorded(rigs[0])
    logits = []
    for rig in rigs:
        adapter = rig.add(made(rig, 3, 1))
        rows = [rig.sequence(prompt(length), adapter) for length in (250, 600)]
        rig.prefill(*rows)
        for sequence in rows:
            sequence.tokens.append(7)
        logits += [decode(rig, rows), decode(rig, rows[:1])]
    assert (logits[0] - logits[2]).abs().max() < 1e-4
    assert (logits[1] - logits[3]).abs().max() < 1e-4
    assert torch.equal(logits[0][:1], logits[1])
    assert capture.captured == 2


@pytest.mark.parametrize("kind", ["merged", "bias", "rank", "prompt"])
def test_what_cannot_be_replayed_takes_the_other_path(kind: str, rigs: tuple[Rig, Rig]) -> None:
    capture = recorded(rigs[0], max_rank=8)
    logits = []
    for rig in rigs:
        mode = AdapterMode.MERGED if kind == "merged" else AdapterMode.UNMERGED
        adapter = rig.add(made(rig, 9 if kind == "rank" else 2, 4, bias=kind == "bias"), mode)
        rows = [rig.sequence(prompt(6), adapter), rig.sequence(prompt(6))]
        rig.prefill(*rows)
        for sequence in rows:
            sequence.tokens += [7, 8] if kind == "prompt" else [7]
        logits.append(rig.forward(*(Chunk(s, 6, len(s) - 6) for s in rows)))
    assert (logits[0] - logits[1]).abs().max() < 1e-4
    assert capture.captured == 0
