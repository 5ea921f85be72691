"""Whole models on the kernels of CUDA devices, interpreted on a CPU: against the reference, and
decoding that is replayed while adapters come and go."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from adaplex.adapters.program.program import AdapterProgram, ModuleProgram
from adaplex.adapters.program.traits import NO_TRAITS
from adaplex.engine.batch import Chunk
from adaplex.engine.request import AdapterMode, AdapterRef
from adaplex.model.forward.decode_steps import DecodeSteps, Replay
from adaplex.model.select import min_rows
from peft_adapters import everything, load_plain, save_adapter
from random_programs import anything, made
from rig import BLOCK, ModelRig, lowered, prompt
from tiny import save_tiny

RANKS = (1, 3, 8, 16)
pytestmark = [pytest.mark.usefixtures("row_by_row"), pytest.mark.slow]


class Recorded:
    """A capture that counts captures and runs."""

    def __init__(self) -> None:
        self.captured = 0
        self.runs = 0

    def __call__(self, step: Replay) -> Replay:
        self.captured += 1

        def run() -> Tensor:
            self.runs += 1
            return step()

        return run


def recorded(rig: ModelRig, **limits: int) -> Recorded:
    """Counts the captures and replays of a rig from now on."""
    capture, forward = Recorded(), rig.runner._forward
    forward._decode = DecodeSteps(
        rig.base, forward._kernels, block_tokens=BLOCK, capture=capture, **limits
    )
    return capture


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two layers: one that others follow, and the last."""
    where = tmp_path_factory.mktemp("llama") / "tiny"
    return save_tiny("llama", where, num_hidden_layers=2)


@pytest.fixture
def rigs(model: Path) -> tuple[ModelRig, ModelRig]:
    """Rigs on Triton's kernels, and on the reference."""
    return ModelRig(model, triton=True), ModelRig(model, native=False)


@pytest.mark.parametrize("architecture", ["llama", "gemma2", "gpt_oss", "gpt2"])
def test_a_mixed_batch_equals_the_reference(
    architecture: str, tiny_model: Callable[[str], Path], tmp_path: Path
) -> None:
    model, outputs, logits = tiny_model(architecture), [], []
    linears = ["q_proj", "o_proj"] if architecture == "gpt_oss" else everything(architecture)
    for i, rank in enumerate(RANKS[1:]):
        fields = {"r": rank, "lora_alpha": rank, "target_modules": linears}
        save_adapter(load_plain(model), tmp_path / str(rank), seed=i, **fields)
    for rig in (ModelRig(model, triton=True), ModelRig(model, native=False)):
        programs = [lowered(tmp_path / str(rank), rig.base.spec) for rank in RANKS[1:]]
        adapters = [rig.add(program) for program in programs]
        chosen = [None, adapters[0], adapters[1], adapters[1], adapters[2]]
        rows = [rig.sequence(prompt(9 + 7 * i, seed=i), a) for i, a in enumerate(chosen)]
        logits.append(rig.prefill(*rows))
        outputs.append(rig.generate(rows, 3))
        logits.append(rig.decode(*rows))
    assert (logits[0] - logits[2]).abs().max() < 1e-4
    assert (logits[1] - logits[3]).abs().max() < 1e-4
    assert outputs[0] == outputs[1]


def test_replays_are_exact_while_adapters_come_and_go(rigs: tuple[ModelRig, ModelRig]) -> None:
    """Adapters replace each other in the arena's bytes and in the kernel's table; one capture."""
    fast, slow = rigs
    capture = recorded(fast)
    programs = [made(fast, rank, seed) for seed, rank in enumerate([*RANKS, 8, 8])]
    extent = max(p.packed_bytes(4) for p in programs)
    tokens = [prompt(12, seed=i) for i in range(4)]
    lone: dict[tuple[int, int], Tensor] = {}

    def run(rig: ModelRig, places: dict[int, int], rows: list[int | None]) -> Tensor:
        """Loads programs into extents (place -> program), decodes the rows, unloads them."""
        for place, which in places.items():
            rig.runner.load_adapter(programs[which], place * extent, extent)
        sequences = []
        for i, which in enumerate(rows):
            digest = None if which is None else programs[which].digest
            adapter = digest and AdapterRef("a", 1, digest, extent, NO_TRAITS, AdapterMode.UNMERGED)
            sequences.append(rig.sequence(tokens[i], adapter or None))
        rig.prefill(*sequences)
        for sequence in sequences:
            sequence.tokens.append(5)
        logits = rig.decode(*sequences)
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


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "gpt2", "gemma2", "mixtral"])
def test_a_batch_of_everything_equals_the_reference(
    architecture: str, tiny_model: Callable[[str], Path]
) -> None:
    logits, rows, adapters = [], [], []
    model = tiny_model(architecture)
    rigs = ModelRig(model, triton=True), ModelRig(model, native=False)
    capture = recorded(rigs[0])
    for rig in rigs:
        adapters = [rig.add(anything(rig, 0)), rig.add(anything(rig, 1)), rig.add(made(rig, 3, 2))]
        chosen = [None, adapters[0], adapters[1], adapters[1], adapters[2]]
        rows = [rig.sequence(prompt(3 + 2 * i, seed=i), a) for i, a in enumerate(chosen)]
        logits.append(rig.prefill(*rows))
        for sequence in rows:
            sequence.tokens.append(30)
        logits.append(rig.decode(*rows))
        logits.append(rig.decode(*rows[:1]))
    for got, expected in zip(logits[:3], logits[3:], strict=True):
        assert (got - expected).abs().max() < 1e-4 * max(1.0, float(expected.abs().max()))
    assert torch.equal(logits[1][0], logits[2][0]), "a base row does not notice the others"
    assert capture.captured == 2


def test_replays_of_everything_are_exact_while_adapters_come_and_go(
    rigs: tuple[ModelRig, ModelRig],
) -> None:
    """An adapter that touches further modules has the step captured again, once."""
    fast, _ = rigs
    capture = recorded(fast)
    programs = [made(fast, 3, 9), *(anything(fast, seed) for seed in range(4))]
    extent = max(p.packed_bytes(4) for p in programs)
    lone: dict[tuple[int, int], Tensor] = {}

    def run(places: list[int], chosen: list[int | None]) -> None:
        """Loads programs into extents, decodes rows of the chosen, unloads them."""
        for place, which in enumerate(places):
            fast.runner.load_adapter(programs[which], place * extent, extent)
        rows = []
        for i, which in enumerate(chosen):
            digest = None if which is None else programs[which].digest
            adapter = digest and AdapterRef("a", 1, digest, extent, NO_TRAITS, AdapterMode.UNMERGED)
            rows.append(fast.sequence(prompt(3, seed=i), adapter or None))
            rows[-1].tokens.append(30 if i % 2 else 5)
        fast.forward(*(Chunk(row, 0, 3) for row in rows))
        for i, (which, got) in enumerate(zip(chosen, fast.decode(*rows), strict=True)):
            if which is not None:
                assert torch.equal(got, lone.setdefault((i, which), got))
        for which in places:
            fast.runner.remove_adapter(programs[which].digest)

    run([0], [0, None, 0, None])
    assert capture.captured == 1
    run([1, 2], [1, None, 2, 2])
    run([3, 4, 0], [3, 3, 4, 0])
    seen = capture.captured
    assert 2 <= seen <= 3
    run([2, 1], [1, 1, 2, None])
    run([0, 3, 4], [3, 0, 4, 0])
    run([1, 4], [None, 4, 4, 1])
    run([0], [0, None, 0, None])
    assert (capture.captured, capture.runs) == (seen, 7)
    assert len(lone) > 8


def test_a_capture_may_run_the_step(rigs: tuple[ModelRig, ModelRig]) -> None:
    """A step captured again for more modules runs on padding: the block of its last row may have
    another owner by now.
    """
    logits = []

    def run_first(step: Replay) -> Replay:
        step()
        return step

    rigs[0].runner._forward._decode._capture = run_first
    for rig in rigs:
        few, more = (rig.add(anything(rig, seed)) for seed in (0, 1))
        gone, other = rig.sequence(prompt(6), few), rig.sequence(prompt(9, seed=1), more)
        other.blocks = gone.blocks
        for sequence in (gone, other):
            rig.prefill(sequence)
            sequence.tokens.append(30)
            logits.append(rig.decode(sequence))
    for got, expected in zip(logits[:2], logits[2:], strict=True):
        assert (got - expected).abs().max() < 1e-4 * max(1.0, float(expected.abs().max()))


def test_a_row_alone_leaves_the_base_as_it_is(rigs: tuple[ModelRig, ModelRig]) -> None:
    fast, _ = rigs
    kept = {name: p.clone() for name, p in fast.base.module.named_parameters()}
    for seed in range(3):
        row = fast.sequence([5], fast.add(anything(fast, seed)))
        fast.decode(row)
    changed = [n for n, p in fast.base.module.named_parameters() if not torch.equal(p, kept[n])]
    assert len(kept) > 5
    assert changed == []


def test_merged_rows_join_those_of_kernels(rigs: tuple[ModelRig, ModelRig]) -> None:
    logits = []
    for rig in rigs:
        merged = rig.add(anything(rig, 0), AdapterMode.MERGED)
        unmerged = rig.add(anything(rig, 1))
        rows = [rig.sequence(prompt(5, seed=i), a) for i, a in enumerate([merged, unmerged, None])]
        logits.append(rig.prefill(*rows))
        logits.append(torch.cat([rig.prefill(row) for row in rows]))
    assert (logits[0] - logits[2]).abs().max() < 1e-4 * max(1.0, float(logits[2].abs().max()))
    assert torch.equal(logits[0][1:], logits[1][1:])
    assert torch.equal(logits[2], logits[3])


def test_virtual_tokens_come_before_prompts_of_other_adapters(
    rigs: tuple[ModelRig, ModelRig],
) -> None:
    """In one chunk, or in two of which the second begins within the virtual tokens."""
    logits = []
    for rig in rigs:
        virtual = ModuleProgram(
            "model.embed_tokens", virtual=torch.linspace(-1, 1, 320).view(5, 64)
        )
        adapters = [rig.add(AdapterProgram("sha256:v", "x", (virtual,))), rig.add(made(rig, 3, 5))]
        whole, cut, other = (rig.sequence(prompt(4), adapters[i]) for i in (0, 0, 1))
        rig.forward(Chunk(cut, 0, 3))
        chunks = [Chunk(other, 0, 4), Chunk(cut, 3, len(cut) - 3), Chunk(whole, 0, len(whole))]
        logits.append(rig.forward(*chunks))
        assert torch.equal(logits[-1][1], logits[-1][2])
        for sequence in (other, cut, whole):
            sequence.tokens.append(9)
        logits.append(rig.decode(other, cut, whole))
    assert (logits[0] - logits[2]).abs().max() < 1e-4
    assert (logits[1] - logits[3]).abs().max() < 1e-4


def test_rows_are_padded_to_powers_of_two_without_harm(rigs: tuple[ModelRig, ModelRig]) -> None:
    fast, _ = rigs
    adapter = fast.add(made(fast, 8, 0))
    rows = [fast.sequence(prompt(10, seed=i), adapter if i % 2 else None) for i in range(5)]
    fast.prefill(*rows)
    for sequence in rows:
        sequence.tokens.append(7)
    capture = recorded(fast)
    together = fast.decode(*rows)
    assert capture.captured == 1
    for count in (1, 2, 3, 4):
        assert torch.equal(fast.decode(*rows[:count]), together[:count])
    assert torch.equal(fast.decode(*rows[3:]), together[3:])
    # One row and it alone without an adapter, two rows, four rows, eight rows.
    assert capture.captured == 4
    assert capture.runs == 6


def test_devices_that_sum_few_rows_in_another_order_get_more(
    rigs: tuple[ModelRig, ModelRig],
) -> None:
    assert (min_rows(torch.device("cpu")), min_rows(torch.device("cuda"))) == (1, 16)
    fast, _ = rigs
    adapter = fast.add(made(fast, 8, 0))
    rows = [fast.sequence(prompt(1, seed=i), adapter if i % 2 else None) for i in range(3)]
    expected = fast.decode(*rows)
    capture = recorded(fast, min_rows=16)
    assert torch.equal(fast.decode(*rows), expected)
    assert torch.equal(fast.decode(*rows[1:2]), expected[1:2])
    assert (capture.captured, capture.runs) == (1, 2)


def test_long_contexts_have_wider_tables(rigs: tuple[ModelRig, ModelRig]) -> None:
    capture = recorded(rigs[0])
    logits = []
    for rig in rigs:
        adapter = rig.add(made(rig, 3, 1))
        rows = [rig.sequence(prompt(length), adapter) for length in (100, 270)]
        rig.prefill(*rows)
        for sequence in rows:
            sequence.tokens.append(7)
        logits += [rig.decode(*rows), rig.decode(*rows[:1])]
    assert (logits[0] - logits[2]).abs().max() < 1e-4
    assert (logits[1] - logits[3]).abs().max() < 1e-4
    assert torch.equal(logits[0][:1], logits[1])
    assert capture.captured == 2


@pytest.mark.parametrize("kind", ["merged", "rank", "prompt"])
def test_what_cannot_be_replayed_takes_the_other_path(
    kind: str, rigs: tuple[ModelRig, ModelRig]
) -> None:
    capture = recorded(rigs[0], max_rank=8)
    logits = []
    for rig in rigs:
        mode = AdapterMode.MERGED if kind == "merged" else AdapterMode.UNMERGED
        adapter = rig.add(made(rig, 9 if kind == "rank" else 2, 4), mode)
        rows = [rig.sequence(prompt(6), adapter), rig.sequence(prompt(6))]
        rig.prefill(*rows)
        for sequence in rows:
            sequence.tokens += [7, 8] if kind == "prompt" else [7]
        logits.append(rig.forward(*(Chunk(s, 6, len(s) - 6) for s in rows)))
    assert (logits[0] - logits[1]).abs().max() < 1e-4
    assert capture.captured == 0
