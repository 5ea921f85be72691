"""Report: the runs of one command, as tables and as JSON."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from importlib.metadata import version
from typing import Any

from adaplex.client.bench.machine import Machine
from adaplex.client.bench.measures import Percentiles
from adaplex.client.bench.session import BenchRun, Session, without_modules
from adaplex.client.types import ServerInfo

COLUMNS = (
    "WORKLOAD",
    "CASE",
    "TOK/S",
    "REQ/S",
    "FIRST P50",
    "P90",
    "P99",
    "INTER P50",
    "P90",
    "P99",
    "KEPT",
    "ERRORS",
    "FLOOR",
    "CORES",
    "MiB",
)
"""Times are in milliseconds; KEPT is attainment, FLOOR the fraction of the roofline reached."""
SWAP_COLUMNS = ("WORKLOAD", "CASE", "INTO", "LOADS", "MEAN", "P50", "P90", "P99", "EVICTED")
"""Times are in milliseconds."""
NONE = "-"


@dataclass(frozen=True)
class Report:
    """The runs of a command, with the server, machine and options that they depend on."""

    server: ServerInfo
    machine: Machine
    options: Mapping[str, Any] = field(hash=False)
    runs: Sequence[BenchRun]
    warnings: Sequence[str]
    adaplex: str
    time: str

    @classmethod
    def of(cls, session: Session, options: Mapping[str, Any], runs: Sequence[BenchRun]) -> Report:
        """Builds the report of a session's runs."""
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
        """Formats the report as JSON that ends in a line end. Times are in milliseconds; names say
        where values are in bytes or seconds.
        """
        return json.dumps(round_floats(asdict(self)), indent=1) + "\n"

    def rows(self) -> list[tuple[object, ...]]:
        """Returns the rows of the table under COLUMNS, one a run."""
        return [_row(run) for run in self.runs]

    def swap_rows(self) -> list[tuple[object, ...]]:
        """Returns the rows of the table under SWAP_COLUMNS, one a run and tier with loads."""
        return [
            (
                run.workload,
                case_label(run.case),
                tier,
                swaps.loads,
                *(f"{value:.1f}" for value in (swaps.mean, swaps.p50, swaps.p90, swaps.p99)),
                swaps.evictions,
            )
            for run in self.runs
            for tier, swaps in (run.swaps or {}).items()
        ]


def case_label(case: Mapping[str, str | float]) -> str:
    """Formats the case of a run: `streams 8, mix zipf`."""
    return ", ".join(f"{name} {value}" for name, value in case.items())


def round_floats(value: Any) -> Any:
    """Returns a value for JSON, with its floats rounded to five significant digits."""
    if isinstance(value, float):
        return float(f"{value:.5g}")
    if isinstance(value, Mapping):
        return {key: round_floats(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [round_floats(item) for item in value]
    return value


def _row(run: BenchRun) -> tuple[object, ...]:
    found, usage = run.measure, run.usage
    return (
        run.workload,
        case_label(run.case),
        f"{found.tokens_per_second:.0f}",
        f"{found.requests_per_second:.2f}",
        *_percentile_cells(found.first_token),
        *_percentile_cells(found.inter_token),
        f"{found.attainment:.0%}",
        found.failed,
        f"{run.roofline.share:.0%}" if run.roofline else NONE,
        f"{usage.cores:.2f}" if usage else NONE,
        usage.peak_bytes >> 20 if usage else NONE,
    )


def _percentile_cells(found: Percentiles | None) -> tuple[str, str, str]:
    if found is None:
        return NONE, NONE, NONE
    return f"{found.p50:.1f}", f"{found.p90:.1f}", f"{found.p99:.1f}"
