"""PrefillPolicy: how much of the prompts a step takes in while others decode."""

from __future__ import annotations

import math
from collections import OrderedDict, deque
from statistics import median

from adaplex.engine.batch import Batch
from adaplex.engine.chunk_cost_model import LEAST, RECENT, ChunkCostModel
from adaplex.engine.config import EngineConfig

ROW_COUNTS = 16
"""Numbers of decoding rows whose steps are remembered, the latest."""
LOOK_EVERY = 16
"""While prompts are under way, one step in so many leaves them out, so that what a step takes
without them stays known; halfway between, a small chunk is of another size than usual."""


class PrefillBudget:
    """What prompts may take of one step: rows, and seconds where others decode.

    The first chunk gets a few tokens however little there is, so that prompts go on.
    """

    def __init__(
        self,
        config: EngineConfig,
        rows: int,
        seconds: float,
        costs: ChunkCostModel,
        trial: bool = False,
        parent: PrefillBudget | None = None,
    ) -> None:
        """`trial`: a chunk that cannot be a block is to tell what another size takes."""
        self._config, self._costs, self._parent = config, costs, parent
        self._trial = trial
        self._rows, self._seconds = rows, seconds
        self._fresh = True

    @property
    def open(self) -> bool:
        """Whether another chunk may be taken."""
        enough = self._fresh or self._seconds >= self._block_seconds
        return self._rows > 0 and enough and (self._parent is None or self._parent.open)

    def split(self, shares: int) -> PrefillBudget:
        """One of so many equal shares of what is left, whole blocks and one at least if there is
        one; taken from both.
        """
        block = self._config.block_tokens
        rows = max(self._rows // shares // block * block, min(block, self._rows))
        seconds = max(self._seconds / shares, min(self._block_seconds, self._seconds))
        return PrefillBudget(self._config, rows, seconds, self._costs, self._trial, self)

    def take(self, start: int, wanted: int) -> int:
        """Tokens of a prompt that is computed up to `start`: at most `wanted`, 0 when not `open`.

        Where some are left for later, the chunk ends at the end of a block if it can.
        """
        if not self.open:
            return 0
        count = min(wanted, self._config.max_chunk_tokens, self._rows)
        unit = self._config.block_tokens
        affordable = self._costs.tokens(start, self._seconds)
        if affordable < 2 * unit:
            affordable = unit = self._costs.small.size(unit, self._seconds, self._trial)
        while LEAST < unit > count:
            unit //= 2
        if affordable < count:
            count = max(1, int(affordable) // unit) * unit
        over = (start + count) % unit
        if count < wanted and over < count:
            count -= over
        self._spend(count, self._costs.seconds(start, count))
        return count

    @property
    def _block_seconds(self) -> float:
        return self._costs.seconds(0, self._config.block_tokens)

    def _spend(self, rows: int, seconds: float) -> None:
        self._rows -= rows
        self._seconds -= seconds
        self._fresh = False
        if self._parent is not None:
            self._parent._spend(rows, seconds)


class PrefillPolicy:
    """Learns from the engine's steps what decoding rows take, and what prompts add; keeps a step
    with both below about `max_stretch` times one without prompts, of all who decode or soon will.

    All figures are medians of a few recent measurements. The rows of prompts in such a step grow
    to twice what went well before, at most, so that nothing is believed far from where it was
    measured.
    """

    def __init__(self, config: EngineConfig) -> None:
        self._config = config
        self._decodes: OrderedDict[int, deque[float]] = OrderedDict()
        """Seconds of steps without prompts by their rows, the latest last."""
        self._costs = ChunkCostModel(config.block_tokens)
        self._tried = config.block_tokens
        """Rows of prompts that may be tried beside decoding ones."""
        self._mixed = 0
        """Steps since the last one without prompts."""
        self._most = 0.0
        """Seconds that the step may take for which the last budget was."""

    def budget(self, decodes: int, joining: int = 0) -> PrefillBudget:
        """What prompts may take of a step in which so many rows decode. With those that are about
        to join, steps will be longer anyway: what they will take is what is stretched.
        """
        rows = self._config.max_step_tokens - decodes
        if not decodes or math.isinf(self._config.max_stretch):
            return PrefillBudget(self._config, rows, math.inf, self._costs)
        if self._mixed >= LOOK_EVERY or not self._decodes:
            return PrefillBudget(self._config, 0, 0.0, self._costs)
        self._most = self._config.max_stretch * self._decode_seconds(decodes + joining)
        seconds = max(0.0, self._most - self._decode_seconds(decodes))
        trial = self._mixed == LOOK_EVERY // 2
        return PrefillBudget(self._config, min(rows, self._tried), seconds, self._costs, trial)

    def note(self, batch: Batch, seconds: float) -> None:
        """A step took so long. To be told before its tokens are appended."""
        prompts = [chunk for chunk in batch.chunks if chunk.count > 1]
        decodes = len(batch.chunks) - len(prompts)
        if not prompts:
            self._mixed = 0
            self._note_decodes(decodes, seconds)
        elif self._decodes and batch.sampling:
            # A step that samples nothing may return before its device is done.
            alone = self._decode_seconds(max(1, decodes))
            self._costs.note(prompts, max(0.0, seconds - alone))
            if decodes:
                self._mixed += 1
                self._note_rows(batch.tokens - decodes, seconds <= self._most)

    def _note_decodes(self, rows: int, seconds: float) -> None:
        self._decodes.setdefault(rows, deque(maxlen=RECENT)).append(seconds)
        self._decodes.move_to_end(rows)
        if len(self._decodes) > ROW_COUNTS:
            self._decodes.popitem(last=False)

    def _note_rows(self, rows: int, went_well: bool) -> None:
        if went_well:
            self._tried = max(self._tried, 2 * rows)
        else:
            self._tried = max(min(self._tried, rows), self._config.block_tokens)

    def _decode_seconds(self, rows: int) -> float:
        """Of a step of so many decoding rows; between measured numbers of rows in proportion,
        beyond them rather too little.
        """
        if (known := self._decodes.get(rows)) is not None:
            return median(known)
        fewer = max((count for count in self._decodes if count < rows), default=0)
        more = min((count for count in self._decodes if count > rows), default=0)
        low = median(self._decodes[fewer]) if fewer else 0.0
        if not more:
            return low
        return low + (median(self._decodes[more]) - low) * (rows - fewer) / (more - fewer)
