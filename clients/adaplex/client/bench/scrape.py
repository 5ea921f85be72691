"""Scrape: the server's Prometheus metrics, and the changes between two scrapes."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from urllib.error import URLError
from urllib.parse import urlsplit
from urllib.request import OpenerDirector, ProxyHandler, build_opener

from adaplex.client._connection import is_loopback
from adaplex.client.errors import Unavailable

SAMPLE = re.compile(r"^(?P<name>[a-zA-Z_:][\w:]*)(?:\{(?P<labels>.*)\})? (?P<value>\S+)")
LABEL = re.compile(r'(\w+)="((?:[^"\\]|\\.)*)"')
TIMEOUT = 10.0

Series = tuple[str, frozenset[tuple[str, str]]]


@dataclass(frozen=True)
class Swaps:
    """Loads of adapters into one tier during a run; times are in milliseconds.

    Percentiles come from the server's histogram and have the resolution of its buckets.
    """

    loads: int
    evictions: int
    mean: float
    p50: float
    p90: float
    p99: float


@dataclass(frozen=True)
class Scrape:
    """The samples of one scrape, or the difference of two."""

    samples: Mapping[Series, float]

    @classmethod
    def read(cls, url: str) -> Scrape:
        """Scrapes a URL. Raises Unavailable if there are no metrics."""
        try:
            with _opener(url).open(url, timeout=TIMEOUT) as response:
                return cls.parse(response.read().decode())
        except (URLError, OSError, ValueError) as error:
            raise Unavailable(f"no metrics at {url}: {error}") from error

    @classmethod
    def parse(cls, text: str) -> Scrape:
        """Parses Prometheus's text format."""
        found = filter(None, map(SAMPLE.match, text.splitlines()))
        return cls(
            {
                (match["name"], frozenset(LABEL.findall(match["labels"] or ""))): float(
                    match["value"]
                )
                for match in found
            }
        )

    def since(self, before: Scrape) -> Scrape:
        """Returns the increase of each sample since an earlier scrape."""
        return Scrape({s: value - before.samples.get(s, 0.0) for s, value in self.samples.items()})

    def values(self, name: str, **wanted: str) -> Iterator[tuple[dict[str, str], float]]:
        """Yields labels and value of each sample of the name that has the wanted labels."""
        for (found, labels), value in self.samples.items():
            if found == name and wanted.items() <= dict(labels).items():
                yield dict(labels), value

    def total(self, name: str, **wanted: str) -> float:
        """Sums up the samples of the name that have the wanted labels."""
        return sum(value for _, value in self.values(name, **wanted))

    def swaps(self) -> dict[str, Swaps]:
        """Returns the swaps of a difference by tier, without tiers that had none."""
        evicted = "adaplex_adapter_evictions_total"
        tiers = sorted({labels["tier"] for labels, _ in self.values(evicted)})
        found = {tier: self._swaps(tier, int(self.total(evicted, tier=tier))) for tier in tiers}
        return {tier: swaps for tier, swaps in found.items() if swaps.loads or swaps.evictions}

    def _swaps(self, tier: str, evictions: int) -> Swaps:
        family = "adaplex_adapter_load_seconds"
        count = self.total(f"{family}_count", tier=tier)
        seconds = self.total(f"{family}_sum", tier=tier)
        buckets = sorted(
            (float(labels["le"]), value)
            for labels, value in self.values(f"{family}_bucket", tier=tier)
        )
        p50, p90, p99 = (1e3 * quantile(buckets, share) for share in (0.5, 0.9, 0.99))
        mean = 1e3 * seconds / count if count else 0.0
        return Swaps(int(count), evictions, mean, p50, p90, p99)


def quantile(buckets: list[tuple[float, float]], share: float) -> float:
    """Computes Prometheus's histogram_quantile of buckets (upper bound, count up to it), in order.

    Returns 0 if there are no values, and the largest finite bound for a quantile beyond it.
    """
    if not buckets or not buckets[-1][1]:
        return 0.0
    rank, lower, below = share * buckets[-1][1], 0.0, 0.0
    for upper, upto in buckets:
        if upto >= rank:
            if upper == float("inf"):
                return lower
            return lower + (upper - lower) * (rank - below) / (upto - below)
        lower, below = upper, upto
    return lower


def _opener(url: str) -> OpenerDirector:
    """Returns an opener that uses the proxies of the environment, except for loopback."""
    return build_opener(*([ProxyHandler({})] if is_loopback(urlsplit(url).netloc) else []))
