"""Measurement: rates, latencies and errors of the results of a run."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Self

from adaplex.client.bench.load import RequestResult


def percentile(ordered: Sequence[float], share: float) -> float:
    """Returns the value below which `share` of the ordered values lie, interpolated as by numpy."""
    position = share * (len(ordered) - 1)
    below = int(position)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (ordered[above] - ordered[below]) * (position - below)


@dataclass(frozen=True)
class Percentiles:
    """Count, mean, percentiles and maximum of times in milliseconds."""

    count: int
    mean: float
    p50: float
    p90: float
    p99: float
    max: float

    @classmethod
    def of(cls, seconds: Sequence[float]) -> Self | None:
        """Computes the percentiles of times in seconds; None if there are none."""
        if not seconds:
            return None
        values = sorted(1e3 * value for value in seconds)
        return cls(
            count=len(values),
            mean=sum(values) / len(values),
            p50=percentile(values, 0.5),
            p90=percentile(values, 0.9),
            p99=percentile(values, 0.99),
            max=values[-1],
        )


@dataclass(frozen=True)
class Measurement:
    """The measurement of a run. Rates are over `seconds`, from first request to last end."""

    requests: int
    errors: Mapping[str, int] = field(hash=False)
    """Number of requests that ended in each error."""
    seconds: float
    output_tokens: int
    tokens_per_second: float
    requests_per_second: float
    """Rate of the requests that finished."""
    first_token: Percentiles | None
    inter_token: Percentiles | None
    """Gaps between arrivals of tokens; a reader that is late receives several tokens at once."""
    per_token: Percentiles | None
    """Mean time a token of each request, which does not depend on late reads."""
    first_token_bound: float
    """Seconds."""
    attainment: float
    """Fraction of all requests that finished and had their first token within the bound."""

    @classmethod
    def of(cls, results: Sequence[RequestResult], first_token_bound: float) -> Self:
        """Computes the measurement of a run's results. Raises ValueError if there are none."""
        if not results:
            raise ValueError("results: no request was sent, so there is nothing to measure")
        seconds = max(r.ended for r in results) - min(r.sent for r in results)
        finished = [result for result in results if not result.error]
        tokens = sum(result.tokens for result in results)
        firsts = [first for r in results if (first := r.first_token) is not None]
        in_time = sum((r.first_token or 0.0) <= first_token_bound for r in finished if r.arrivals)
        return cls(
            requests=len(results),
            errors=dict(Counter(result.error for result in results if result.error)),
            seconds=seconds,
            output_tokens=tokens,
            tokens_per_second=tokens / seconds,
            requests_per_second=len(finished) / seconds,
            first_token=Percentiles.of(firsts),
            inter_token=Percentiles.of([gap for result in results for gap in result.gaps]),
            per_token=Percentiles.of([p for r in results if (p := r.per_token) is not None]),
            first_token_bound=first_token_bound,
            attainment=in_time / len(results),
        )

    @property
    def failed(self) -> int:
        """Number of requests that did not finish."""
        return sum(self.errors.values())
