"""Workload: who asks what, and when. Plain data, the same for the same seed.

Popularities of a batch are Punica's (arXiv 2310.18547, `get_lora_lens`), arrivals and adapters of a
trace S-LoRA's (arXiv 2311.03285).
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass

MIXES = ("base", "identical", "zipf", "uniform", "distinct")
"""Popularities of a batch, from no adapter to one for every stream."""
ZIPF = 1.5
"""Punica: each adapter has this many times the streams of the next. Draws: exponent of the rank."""


@dataclass(frozen=True)
class Ask:
    """One request. `adapter` None is the base; `output` in tokens, `at` in seconds."""

    adapter: str | None
    prompt: tuple[int, ...]
    output: int
    at: float = 0.0
    """After the start, in an open loop."""


class Prompts:
    """Prompts of random tokens, each new, so that no prefix cache answers for the model."""

    def __init__(self, vocab_size: int, seed: int) -> None:
        self._vocab, self._dice = range(vocab_size), random.Random(seed)

    def draw(self, length: int) -> tuple[int, ...]:
        """A prompt of this many tokens."""
        return tuple(self._dice.choices(self._vocab, k=length))

    def asks(self, adapter: str | None, prompt: int, output: int) -> Iterator[Ask]:
        """Asks of one adapter, without end, with prompts of `prompt` tokens."""
        while True:
            yield Ask(adapter, self.draw(prompt), output)


def shares(mix: str, streams: int) -> list[int]:
    """How many of the streams ask each adapter, most popular first; nothing for `base`."""
    match mix:
        case "base":
            return []
        case "identical":
            return [streams]
        case "distinct":
            return [1] * streams
        case "uniform":
            adapters = math.ceil(math.sqrt(streams))
            least, more = divmod(streams, adapters)
            return [least + (i < more) for i in range(adapters)]
        case "zipf":
            return _geometric(streams, ZIPF)
    raise ValueError(f"mix: {mix!r} is not one of {', '.join(MIXES)}")


def assigned(mix: str, streams: int) -> list[int | None]:
    """The adapter of each stream by its index; None is the base."""
    spread = [index for index, share in enumerate(shares(mix, streams)) for _ in range(share)]
    return [*spread] if spread else [None] * streams


def chooser(mix: str, count: int, dice: random.Random) -> Callable[[], int]:
    """Draws indices below `count`: `uniform`, or `zipf` with popularities in random order."""
    if mix == "uniform":
        return lambda: dice.randrange(count)
    weights = [1 / (rank + 1) ** ZIPF for rank in range(count)]
    order = dice.sample(range(count), count)
    return lambda: order[dice.choices(range(count), weights)[0]]


def power_index(alpha: float, count: int, dice: random.Random) -> int:
    """`int(numpy.random.power(alpha) * count)`: uniform at 1, few of them often below."""
    return min(int(dice.random() ** (1 / alpha) * count), count - 1)


@dataclass(frozen=True)
class Trace:
    """S-LoRA's generator. Lengths are drawn from [low, high) tokens, `rate` is in requests/s."""

    alpha: float = 1.0
    rate: float = 2.0
    cv: float = 1.0
    """Of the gaps: 0 is a clock, 1 Poisson, more comes in bursts."""
    seconds: float = 120.0
    inputs: tuple[int, int] = (8, 512)
    outputs: tuple[int, int] = (8, 512)

    def asks(self, adapters: list[str], prompts: Prompts, seed: int) -> list[Ask]:
        """`rate` times `seconds` requests, in order of their times."""
        dice, now, asks = random.Random(seed), 0.0, []
        for _ in range(max(1, int(self.rate * self.seconds))):
            now += self._gap(dice)
            asks.append(
                Ask(
                    adapter=adapters[power_index(self.alpha, len(adapters), dice)],
                    prompt=prompts.draw(dice.randrange(*self.inputs)),
                    output=dice.randrange(*self.outputs),
                    at=now,
                )
            )
        return asks

    def _gap(self, dice: random.Random) -> float:
        if self.cv == 0:
            return 1 / self.rate
        return dice.gammavariate(1 / self.cv**2, self.cv**2 / self.rate)


def _geometric(streams: int, ratio: float) -> list[int]:
    """1, ratio, ratio^2 ... rounded down; the most popular adapter takes what is left."""
    found: list[int] = []
    share = 1.0
    while sum(found) + int(share) < streams:
        found.append(int(share))
        share *= ratio
    return sorted([*found, streams - sum(found)], reverse=True)
