"""Measure: what many answers come to."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Self

from adaplex.client.bench.load import Answer


def percentile(ordered: Sequence[float], share: float) -> float:
    """The value that `share` of the ordered values lie below, interpolated as numpy does."""
    place = share * (len(ordered) - 1)
    below = int(place)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (ordered[above] - ordered[below]) * (place - below)


@dataclass(frozen=True)
class Percentiles:
    """How many values, and where they lie, in milliseconds."""

    count: int
    mean: float
    p50: float
    p90: float
    p99: float
    max: float

    @classmethod
    def of(cls, seconds: Sequence[float]) -> Self | None:
        """Of times in seconds; None when there are none."""
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
class Measure:
    """One measurement. Rates are over `seconds`, from the first ask to the last end."""

    requests: int
    errors: Mapping[str, int] = field(hash=False)
    """How many ended in which error."""
    seconds: float
    output_tokens: int
    tokens_per_second: float
    requests_per_second: float
    """Of those that were answered to their end."""
    first_token: Percentiles | None
    inter_token: Percentiles | None
    """Of every gap, as it was read: a reader that is late finds several tokens at once."""
    per_token: Percentiles | None
    """Of each answer's mean, which such a reader does not change."""
    first_token_bound: float
    """Seconds."""
    attainment: float
    """Share of all requests that were answered to their end, the first token within the bound."""

    @classmethod
    def of(cls, answers: Sequence[Answer], first_token_bound: float) -> Self:
        """Of the answers of one run. ValueError when there are none."""
        if not answers:
            raise ValueError("nothing was asked, so there is nothing to measure")
        seconds = max(a.ended for a in answers) - min(a.sent for a in answers)
        good = [answer for answer in answers if not answer.error]
        tokens = sum(answer.tokens for answer in answers)
        firsts = [first for a in answers if (first := a.first_token) is not None]
        kept = sum((a.first_token or 0.0) <= first_token_bound for a in good if a.arrivals)
        return cls(
            requests=len(answers),
            errors=dict(Counter(answer.error for answer in answers if answer.error)),
            seconds=seconds,
            output_tokens=tokens,
            tokens_per_second=tokens / seconds,
            requests_per_second=len(good) / seconds,
            first_token=Percentiles.of(firsts),
            inter_token=Percentiles.of([gap for answer in answers for gap in answer.gaps]),
            per_token=Percentiles.of([p for a in answers if (p := a.per_token) is not None]),
            first_token_bound=first_token_bound,
            attainment=kept / len(answers),
        )

    @property
    def failed(self) -> int:
        """How many requests were not answered to their end."""
        return sum(self.errors.values())
