"""Inputs of decoding steps, whose buffers are filled again for each step."""

from __future__ import annotations

import random

import torch

from adaplex.engine.batch import Chunk
from adaplex.engine.request import Request, SamplingParams
from adaplex.engine.sequence import Sequence
from adaplex.model.forward.decode_steps import AdapterUse, Shape, StepInputs
from adaplex.model.step.tiles import Tile
from rig import BLOCK


def test_inputs_are_those_of_the_step_whatever_the_buffer_held_before() -> None:
    """Rows come and go, change places, grow, and are moved to other blocks."""
    dice, inputs = random.Random(4), StepInputs(Shape(8, 6, AdapterUse.PLAIN), torch.device("cpu"))
    sequences = [Sequence(Request(str(i), (0,), SamplingParams())) for i in range(10)]
    for sequence in sequences:
        sequence.tokens = dice.choices(range(3, 300), k=BLOCK * 6)
        sequence.blocks = dice.sample(range(1, 50), 6)
    for _ in range(200):
        for sequence in dice.sample(sequences, 3):
            sequence.blocks = dice.sample(range(1, 50), 6)
        rows = dice.sample(sequences, dice.randint(1, 8))
        chunks = [Chunk(row, dice.randrange(BLOCK * 6), 1) for row in rows]
        tiles = [Tile(dice.randrange(9), i, 1) for i in range(dice.randint(0, len(rows)))]
        inputs.fill(chunks, tiles, BLOCK)
        for row, chunk in enumerate(chunks):
            used = chunk.start // BLOCK + 1
            assert inputs.tables[row].tolist() == chunk.sequence.blocks[:used] + [0] * (6 - used)
            assert inputs.tokens[row] == chunk.sequence.tokens[chunk.start]
            assert inputs.positions[row] == chunk.start
            slot = chunk.sequence.blocks[used - 1] * BLOCK + chunk.start % BLOCK
            assert inputs.slots[row] == slot
        for column in (inputs.tokens, inputs.positions, inputs.slots, inputs.tables):
            assert not column[len(rows) :].any()
        assert [*map(tuple, inputs.tiles.T.tolist())] == tiles + [Tile.none()] * (8 - len(tiles))
