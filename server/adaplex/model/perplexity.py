"""Losses of a text's tokens, by the runner's own forward: what is measured is what is served.

A forward returns logits after the last known token of a sequence. So each position of a window is a
sequence of its own, whose tokens end there, and all of them share the blocks of the window: a step
writes the keys and values of its rows before any row attends.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from collections.abc import Sequence as Seq
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from adaplex.engine.batch import Batch, Chunk
from adaplex.engine.request import AdapterRef, Request, SamplingParams
from adaplex.engine.sequence import Sequence
from adaplex.model.runner import ModelRunner
from adaplex.model.tensors import int64_tensor

ROWS = 64
"""Positions in one step."""


@dataclass(frozen=True)
class Window:
    """The tokens [start, end) of a text; those from `first` on are scored."""

    start: int
    end: int
    first: int


def windows(count: int, length: int, stride: int) -> Iterator[Window]:
    """Yields windows of up to `length` tokens, each `stride` after the one before. A token is
    scored in the first window that contains it, unless it is that window's first token, which has
    nothing before it.
    """
    first = 1
    for start in range(0, count - 1, stride):
        end = min(start + length, count)
        yield Window(start, end, max(first, start + 1))
        first = end
        if end == count:
            return


def window_blocks(positions: int, block_tokens: int) -> int:
    """Returns the KV blocks that a runner needs: those of a window, and the scratch block."""
    return 1 + -(-positions // block_tokens)


def token_losses(
    runner: ModelRunner,
    tokens: Seq[int],
    adapter: AdapterRef | None,
    *,
    length: int,
    stride: int,
    block_tokens: int,
) -> Tensor:
    """Returns fp32 [scored]: the nats of each scored token, by `windows`. `adapter` is in memory.
    Raises ValueError for a window that lacks the tokens that invoke it.
    """
    losses = [
        _window_losses(runner, tokens[w.start : w.end], w.first - w.start, adapter, block_tokens)
        for w in windows(len(tokens), length, stride)
    ]
    return torch.cat(losses)


def _window_losses(
    runner: ModelRunner,
    tokens: Seq[int],
    first: int,
    adapter: AdapterRef | None,
    block_tokens: int,
) -> Tensor:
    """Returns fp32 [len(tokens) - first]: the nats of the tokens from `first` on, each after all
    tokens before it.
    """
    request = Request("perplexity", tuple(tokens), SamplingParams(), adapter)
    if request.invoked_at is None:
        raise ValueError("a window of the text lacks the tokens that invoke the adapter")
    whole = Sequence(request)
    whole.blocks = list(range(1, window_blocks(len(whole), block_tokens)))
    before = whole.leading + first - 1
    if before:
        runner.forward(Batch((Chunk(whole, 0, before),)))
    losses = []
    for start in range(before, len(whole) - 1, ROWS):
        ends = range(start + 1, min(start + ROWS, len(whole) - 1) + 1)
        logits = runner.forward(Batch(tuple(Chunk(_until(whole, e), e - 1, 1) for e in ends)))
        following = int64_tensor(whole.tokens[ends.start : ends.stop], logits.device)
        losses.append(F.cross_entropy(logits, following, reduction="none").cpu())
    return torch.cat(losses)


def _until(whole: Sequence, end: int) -> Sequence:
    """Returns the sequence as it was when it had `end` tokens, on the same blocks."""
    part = copy.copy(whole)
    part.tokens = whole.tokens[:end]
    return part
