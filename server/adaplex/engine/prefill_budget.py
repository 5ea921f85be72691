"""PrefillPolicy: how many prompt tokens a step computes while other sequences decode."""

from __future__ import annotations

import math
from collections import OrderedDict, deque
from statistics import median

from adaplex.engine.batch import Batch
from adaplex.engine.chunk_cost_model import MIN_CHUNK, RECENT, ChunkCostModel
from adaplex.engine.config import EngineConfig

ROW_COUNTS = 16
"""Numbers of decoding rows whose steps are remembered, the latest."""
SHORT_SECONDS = 0.1
"""Seconds that short prompts may add to a step in any case: too little to see in a stream, while in
chunks of a few tokens their first token would come several times as late."""
SHORT_ROWS = 32
"""Rows that they may add in any case, on a machine that takes longer: a row of fewer costs more."""
MEASURE_EVERY = 16
"""While prompts run, one step in MEASURE_EVERY leaves them out, so that the seconds of a step
without prompts stay known; halfway between, a small chunk has another size than usual."""


class PrefillBudget:
    """Rows that prompts may add to one step, and seconds if other sequences decode.

    The first chunk gets a few tokens however small the budget is, so that prompts proceed.
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
        """`trial`: chunks smaller than a block get another size than usual, to be measured."""
        self._config, self._costs, self._parent = config, costs, parent
        self._trial = trial
        self._rows, self._seconds = rows, seconds
        self._untouched = True

    @property
    def open(self) -> bool:
        """True if the budget has room for another chunk."""
        enough = self._untouched or self._seconds >= self._block_seconds
        return self._rows > 0 and enough and (self._parent is None or self._parent.open)

    def split(self, shares: int) -> PrefillBudget:
        """Returns one of `shares` equal parts of the remaining budget, in whole blocks, at least
        one if there is one. What it spends is spent from this budget too.
        """
        block = self._config.block_tokens
        rows = max(self._rows // shares // block * block, min(block, self._rows))
        seconds = max(self._seconds / shares, min(self._block_seconds, self._seconds))
        return PrefillBudget(self._config, rows, seconds, self._costs, self._trial, self)

    def spend(self, start: int, limit: int) -> int:
        """Spends budget on a chunk from position `start` of a prompt; returns its tokens, at most
        `limit`, 0 if the budget is not `open`.

        A chunk that leaves tokens for later ends at the end of a block if it can.
        """
        if not self.open:
            return 0
        count = min(limit, self._config.max_chunk_tokens, self._rows)
        unit = self._config.block_tokens
        affordable = self._costs.tokens(start, self._seconds)
        if affordable < 2 * unit:
            affordable = unit = self._costs.small_chunk(self._seconds, trial=self._trial)
        while MIN_CHUNK < unit > count:
            unit //= 2
        if affordable < count:
            count = max(1, int(affordable) // unit) * unit
        over = (start + count) % unit
        if count < limit and over < count:
            count -= over
        self._subtract(count, self._costs.seconds(start, count))
        return count

    @property
    def _block_seconds(self) -> float:
        return self._costs.seconds(0, self._config.block_tokens)

    def _subtract(self, rows: int, seconds: float) -> None:
        self._rows -= rows
        self._seconds -= seconds
        self._untouched = False
        if self._parent is not None:
            self._parent._subtract(rows, seconds)


class PrefillPolicy:
    """Learns from the engine's steps the seconds of decoding rows, and those that prompts add; then
    limits a step with both to about `max_stretch` times a step without prompts, of all sequences
    that decode or soon will. Short prompts alone may add
    SHORT_SECONDS or SHORT_ROWS in any case.

    All figures are medians of a few recent measurements. The prompt rows of such a step grow to at
    most twice those of a step within the limit, so that the model is never extrapolated beyond
    twice a measured size.
    """

    def __init__(self, config: EngineConfig) -> None:
        self._config = config
        self._decodes: OrderedDict[int, deque[float]] = OrderedDict()
        """Seconds of steps without prompts by their rows, the latest last."""
        self._costs = ChunkCostModel(config.block_tokens)
        self._max_rows = config.block_tokens
        """Prompt rows that the next step may have beside decoding rows."""
        self._steps_mixed = 0
        """Steps since the last one without prompts."""
        self._limit_seconds = 0.0
        """Seconds that the step of the last budget may take."""

    def budget(self, decodes: int, joining: int = 0, *, short: bool = False) -> PrefillBudget:
        """Returns what prompts may add to a step of `decodes` decoding rows; `short` if all prompts
        under way are short.

        The stretched time is that of a step of `decodes + joining` rows: with rows that are about
        to decode, steps will be longer anyway.
        """
        rows = self._config.max_step_tokens - decodes
        if not decodes or math.isinf(self._config.max_stretch):
            return PrefillBudget(self._config, rows, math.inf, self._costs)
        if self._steps_mixed >= MEASURE_EVERY or not self._decodes:
            return PrefillBudget(self._config, 0, 0.0, self._costs)
        alone = self._decode_seconds(decodes)
        stretched = self._config.max_stretch * self._decode_seconds(decodes + joining)
        seconds, prompt_rows = max(0.0, stretched - alone), self._max_rows
        if short:
            seconds = max(seconds, SHORT_SECONDS, self._costs.seconds(0, SHORT_ROWS))
            prompt_rows = max(prompt_rows, SHORT_ROWS)
        self._limit_seconds = alone + seconds
        trial = self._steps_mixed == MEASURE_EVERY // 2
        return PrefillBudget(self._config, min(rows, prompt_rows), seconds, self._costs, trial)

    def record(self, batch: Batch, seconds: float) -> None:
        """Records the seconds of a step. Called before its tokens are appended."""
        prompts = [chunk for chunk in batch.chunks if chunk.count > 1]
        decodes = len(batch.chunks) - len(prompts)
        if not prompts:
            self._steps_mixed = 0
            self._record_decodes(decodes, seconds)
        elif self._decodes and batch.sampling:
            # A step that samples nothing may return before its device is done.
            alone = self._decode_seconds(max(1, decodes))
            self._costs.record(prompts, max(0.0, seconds - alone))
            if decodes:
                self._steps_mixed += 1
                within_limit = seconds <= self._limit_seconds
                self._adapt_max_rows(batch.tokens - decodes, within_limit)

    def _record_decodes(self, rows: int, seconds: float) -> None:
        self._decodes.setdefault(rows, deque(maxlen=RECENT)).append(seconds)
        self._decodes.move_to_end(rows)
        if len(self._decodes) > ROW_COUNTS:
            self._decodes.popitem(last=False)

    def _adapt_max_rows(self, rows: int, within_limit: bool) -> None:
        if within_limit:
            self._max_rows = max(self._max_rows, 2 * rows)
        else:
            self._max_rows = max(min(self._max_rows, rows), self._config.block_tokens)

    def _decode_seconds(self, rows: int) -> float:
        """Returns the seconds of a step of decoding rows: interpolated between measured numbers of
        rows; above them, those of the largest, rather too low.
        """
        if (known := self._decodes.get(rows)) is not None:
            return median(known)
        fewer = max((count for count in self._decodes if count < rows), default=0)
        more = min((count for count in self._decodes if count > rows), default=0)
        low = median(self._decodes[fewer]) if fewer else 0.0
        if not more:
            return low
        return low + (median(self._decodes[more]) - low) * (rows - fewer) / (more - fewer)
