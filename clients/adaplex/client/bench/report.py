"""Report: the runs of one command, as a table and as JSON."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from importlib.metadata import version
from typing import Any

from adaplex.client.bench.machine import Machine
from adaplex.client.bench.measures import Percentiles
from adaplex.client.bench.session import Run, Session, without_modules
from adaplex.client.types import ServerInfo

COLUMNS = (
    *("WORKLOAD", "CASE", "TOK/S", "REQ/S", "FIRST P50", "P90", "P99"),
    *("INTER P50", "P90", "P99", "KEPT", "ERRORS", "FLOOR", "CORES", "MiB"),
)
"""Times in milliseconds; KEPT is attainment, FLOOR the share of the roofline."""
SWAP_COLUMNS = ("WORKLOAD", "CASE", "INTO", "LOADS", "MEAN", "P50", "P90", "P99", "EVICTED")
"""Times in milliseconds."""
NONE = "-"


@dataclass(frozen=True)
class Report:
    """Everything that is needed to read the figures later."""

    server: ServerInfo
    machine: Machine
    options: Mapping[str, Any] = field(hash=False)
    runs: Sequence[Run]
    warnings: Sequence[str]
    adaplex: str
    time: str

    @classmethod
    def of(cls, session: Session, options: Mapping[str, Any], runs: Sequence[Run]) -> Report:
        """Of a session that has ended its runs."""
        return cls(
            server=without_modules(session.info),
            machine=session.machine,
            options=options,
            runs=tuple(runs),
            warnings=tuple(session.warnings),
            adaplex=version("adaplex"),
            time=datetime.now(UTC).isoformat(timespec="seconds"),
        )

    def json(self) -> str:
        """Times in milliseconds, bytes and seconds where a name says so; ends in a line end."""
        return json.dumps(rounded(asdict(self)), indent=1) + "\n"

    def rows(self) -> list[tuple[object, ...]]:
        """One for each run, under COLUMNS."""
        return [_row(run) for run in self.runs]

    def swap_rows(self) -> list[tuple[object, ...]]:
        """One for each run and tier into which adapters came, under SWAP_COLUMNS."""
        return [
            (
                *(run.workload, said(run.case), tier, swaps.loads),
                *(f"{value:.1f}" for value in (swaps.mean, swaps.p50, swaps.p90, swaps.p99)),
                swaps.evictions,
            )
            for run in self.runs
            for tier, swaps in (run.swaps or {}).items()
        ]


def said(case: Mapping[str, str | float]) -> str:
    """What distinguishes a run, in a few words."""
    return ", ".join(f"{name} {value}" for name, value in case.items())


def rounded(value: Any) -> Any:
    """The same with floats of five significant digits, and with mappings and lists of JSON."""
    if isinstance(value, float):
        return float(f"{value:.5g}")
    if isinstance(value, Mapping):
        return {key: rounded(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [rounded(item) for item in value]
    return value


def _row(run: Run) -> tuple[object, ...]:
    found, usage = run.measure, run.usage
    return (
        *(run.workload, said(run.case)),
        *(f"{found.tokens_per_second:.0f}", f"{found.requests_per_second:.2f}"),
        *(*_shown(found.first_token), *_shown(found.inter_token)),
        *(f"{found.attainment:.0%}", found.failed),
        f"{run.roofline.share:.0%}" if run.roofline else NONE,
        *((f"{usage.cores:.2f}", usage.peak_bytes >> 20) if usage else (NONE, NONE)),
    )


def _shown(found: Percentiles | None) -> tuple[str, str, str]:
    if found is None:
        return NONE, NONE, NONE
    return f"{found.p50:.1f}", f"{found.p90:.1f}", f"{found.p99:.1f}"
