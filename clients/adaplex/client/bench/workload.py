"""Workloads: prompts, adapters and times of requests, deterministic for a seed.

Popularities of a batch are Punica's (arXiv 2310.18547, `get_lora_lens`), arrivals and adapters of a
trace S-LoRA's (arXiv 2311.03285).
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass

MIXES = ("base", "identical", "zipf", "uniform", "distinct")
"""Popularities of adapters in a batch, from no adapter to one for every stream."""
ZIPF = 1.5
"""Punica's ratio of the streams of one adapter to those of the next. Draws of `index_sampler` fall
with this power of the rank.
"""


@dataclass(frozen=True)
class BenchRequest:
    """A request. `adapter` None is the base model; `prompt` is token ids, `output` in tokens."""

    adapter: str | None
    prompt: tuple[int, ...]
    output: int
    at: float = 0.0
    """Seconds from the start of an open loop at which it is sent."""


class Prompts:
    """Prompts of random tokens, none repeated, so that no prefix cache saves their computation."""

    def __init__(self, vocab_size: int, seed: int) -> None:
        self._vocab, self._dice = range(vocab_size), random.Random(seed)

    def draw(self, length: int) -> tuple[int, ...]:
        """Returns a new prompt of `length` tokens."""
        return tuple(self._dice.choices(self._vocab, k=length))

    def requests(self, adapter: str | None, prompt: int, output: int) -> Iterator[BenchRequest]:
        """Yields requests for one adapter without end; `prompt` and `output` are in tokens."""
        while True:
            yield BenchRequest(adapter, self.draw(prompt), output)


def streams_per_adapter(mix: str, streams: int) -> list[int]:
    """Returns the number of streams of each adapter, most popular first; empty for `base`.

    Raises ValueError for a mix that is not in MIXES.
    """
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


def adapter_indices(mix: str, streams: int) -> list[int | None]:
    """Returns the index of each stream's adapter; None is the base model."""
    spread = [
        index for index, share in enumerate(streams_per_adapter(mix, streams)) for _ in range(share)
    ]
    return [*spread] if spread else [None] * streams


def index_sampler(mix: str, count: int, rng: random.Random) -> Callable[[], int]:
    """Returns a function that draws indices below `count`: `uniform`, or `zipf` over a random order
    of the indices.
    """
    if mix == "uniform":
        return lambda: rng.randrange(count)
    weights = [1 / (rank + 1) ** ZIPF for rank in range(count)]
    order = rng.sample(range(count), count)
    return lambda: order[rng.choices(range(count), weights)[0]]


def power_law_index(alpha: float, count: int, rng: random.Random) -> int:
    """Draws `int(numpy.random.power(alpha) * count)`: uniform for alpha 1, skewed below 1."""
    return min(int(rng.random() ** (1 / alpha) * count), count - 1)


@dataclass(frozen=True)
class Trace:
    """S-LoRA's generator of traces. Lengths are drawn from [low, high) tokens, `rate` is in
    requests/s; `alpha` is the exponent of the adapters' power law.
    """

    alpha: float = 1.0
    rate: float = 2.0
    cv: float = 1.0
    """Coefficient of variation of the gaps: 0 is periodic, 1 is Poisson, more is bursty."""
    seconds: float = 120.0
    inputs: tuple[int, int] = (8, 512)
    outputs: tuple[int, int] = (8, 512)

    def requests(self, adapters: list[str], prompts: Prompts, seed: int) -> list[BenchRequest]:
        """Returns `rate` times `seconds` requests, at least one, in order of their times."""
        rng, now, requests = random.Random(seed), 0.0, []
        for _ in range(max(1, int(self.rate * self.seconds))):
            now += self._gap(rng)
            requests.append(
                BenchRequest(
                    adapter=adapters[power_law_index(self.alpha, len(adapters), rng)],
                    prompt=prompts.draw(rng.randrange(*self.inputs)),
                    output=rng.randrange(*self.outputs),
                    at=now,
                )
            )
        return requests

    def _gap(self, rng: random.Random) -> float:
        if self.cv == 0:
            return 1 / self.rate
        return rng.gammavariate(1 / self.cv**2, self.cv**2 / self.rate)


def _geometric(streams: int, ratio: float) -> list[int]:
    """Returns 1, ratio, ratio^2 ... rounded down; the most popular adapter gets the remainder."""
    found: list[int] = []
    share = 1.0
    while sum(found) + int(share) < streams:
        found.append(int(share))
        share *= ratio
    return sorted([*found, streams - sum(found)], reverse=True)
