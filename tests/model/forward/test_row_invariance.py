"""A row's logits have the same bits alone, in any batch, in any chunks, token by token, and on one
thread or several."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import cycle, product
from pathlib import Path

import pytest
import torch

from adaplex.engine.batch import Chunk
from rig import ModelRig, prompt
from tiny import ARCHITECTURES, save_tiny

LENGTHS = (5, 17, 40, 300, 70)
QUANTIZATIONS = ("fp32", "bf16", "nf4", "int8", "int4-group")
IN_ALL = ("llama", "mixtral")
"""Architectures in every quantization: one for the C decoder, one for modules, with experts."""
IN_TURN = {
    architecture: ("bf16", "nf4", "int8", "int4-group")[index % 4]
    for index, architecture in enumerate(sorted(ARCHITECTURES.keys() - set(IN_ALL)))
}
"""Other weights change the products of linears alone: `make test` takes fp32 and one more for each
other architecture, `make test-slow` the rest."""
BASES = [
    pytest.param(
        *pair,
        marks=()
        if pair[0] in IN_ALL or pair[1] in ("fp32", IN_TURN[pair[0]])
        else pytest.mark.slow,
    )
    for pair in product(sorted(ARCHITECTURES), QUANTIZATIONS)
]


@pytest.fixture
def three_threads() -> Iterator[None]:
    """BLAS splits rows between threads, and treats rows left over from a tile differently."""
    torch.set_num_threads(3)
    yield
    torch.set_num_threads(1)


@pytest.mark.parametrize(("architecture", "quantization"), BASES)
def test_logits_are_bit_equal_however_computed(
    architecture: str, quantization: str, tiny_model: Callable[[str], Path]
) -> None:
    check(ModelRig(tiny_model(architecture), quantization))


@pytest.mark.parametrize("architecture", ["llama", "mixtral"])
def test_logits_are_bit_equal_on_several_threads(
    architecture: str, three_threads: None, tiny_model: Callable[[str], Path]
) -> None:
    check(ModelRig(tiny_model(architecture), "fp32"))


def test_wide_routers_give_the_same_bits(tmp_path: Path) -> None:
    """BLAS sums 128 products for a few rows in another order than for many."""
    check(ModelRig(save_tiny("mixtral", tmp_path / "model", hidden_size=128), "fp32"))


def check(rig: ModelRig) -> None:
    sequences = [rig.sequence(prompt(length)) for length in LENGTHS]
    alone = [rig.prefill(sequence)[0] for sequence in sequences]
    assert alone[0].abs().max() > 0.1

    together = rig.prefill(*sequences)
    reverse = rig.prefill(*reversed(sequences)).flip(0)
    for row, expected in enumerate(alone):
        assert torch.equal(together[row], expected)
        assert torch.equal(reverse[row], expected)

    for sequence, expected in zip(sequences, alone, strict=True):
        start, sizes = 0, cycle((7, 1, 33, 64))
        while start < len(sequence):
            chunk = Chunk(sequence, start, min(next(sizes), len(sequence) - start))
            logits, start = rig.forward(chunk), chunk.end
        assert torch.equal(logits[0], expected)

    short = sequences[:3]
    last = {}
    for position in range(max(map(len, short))):
        live = [s for s in short if position < len(s)]
        logits = rig.forward(*(Chunk(s, position, 1) for s in live))
        done = [s for s in live if position == len(s) - 1]
        last.update({id(s): row for s, row in zip(done, logits, strict=True)})
    for sequence, expected in zip(short, alone, strict=False):
        assert torch.equal(last[id(sequence)], expected)
