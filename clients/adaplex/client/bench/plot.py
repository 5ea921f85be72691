"""A plot of a report: throughput and latencies, a row of panels for each workload."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import groupby
from operator import attrgetter
from pathlib import Path
from typing import Any

from adaplex.client.bench.report import case_label
from adaplex.client.bench.session import BenchRun
from adaplex.client.errors import FailedPrecondition

LINES = {"punica": "streams", "cliff": "arenas"}
"""Workloads drawn as one line a mix, over this field of their case. Others are drawn as bars."""
PANELS: dict[str, Callable[[BenchRun], float]] = {
    "tokens/s": lambda run: run.measure.tokens_per_second,
    "first token, median ms": lambda run: _value_or_zero(run.measure.first_token, "p50"),
    "first token, P99 ms": lambda run: _value_or_zero(run.measure.first_token, "p99"),
    "between tokens, P99 ms": lambda run: _value_or_zero(run.measure.inter_token, "p99"),
}


def check_plotting() -> None:
    """Raises FailedPrecondition if matplotlib is missing, to be called before a long run."""
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise FailedPrecondition("a plot needs matplotlib: pip install 'adaplex[bench]'") from error


def draw(runs: Sequence[BenchRun], path: Path) -> None:
    """Writes the plot in the format of the path's suffix. Raises FailedPrecondition as above."""
    check_plotting()
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    groups = [(name, list(found)) for name, found in groupby(runs, attrgetter("workload"))]
    size = (3.4 * len(PANELS), 2.8 * len(groups))
    figure, rows = pyplot.subplots(len(groups), len(PANELS), figsize=size, squeeze=False)
    for (workload, found), row in zip(groups, rows, strict=True):
        for (title, value), axes in zip(PANELS.items(), row, strict=True):
            axes.set_title(f"{workload}: {title}", fontsize=9)
            (_lines if workload in LINES else _bars)(axes, found, value)
            axes.set_ylim(bottom=0)
            axes.grid(alpha=0.3)
    figure.tight_layout()
    metadata = {"Date": None} if path.suffix == ".svg" else None
    figure.savefig(path, metadata=metadata)
    pyplot.close(figure)


def _lines(axes: Any, runs: Sequence[BenchRun], value: Callable[[BenchRun], float]) -> None:
    field = LINES[runs[0].workload]
    for mix in dict.fromkeys(run.case["mix"] for run in runs):
        chosen = [run for run in runs if run.case["mix"] == mix]
        axes.plot([r.case[field] for r in chosen], [*map(value, chosen)], marker="o", label=mix)
    axes.set_xlabel(field)
    axes.legend(frameon=False, fontsize=7)


def _bars(axes: Any, runs: Sequence[BenchRun], value: Callable[[BenchRun], float]) -> None:
    axes.bar(
        [case_label(run.case).replace(", ", "\n") for run in runs], [*map(value, runs)], width=0.5
    )
    axes.tick_params("x", labelsize=7)


def _value_or_zero(found: object, name: str) -> float:
    return float(getattr(found, name)) if found else 0.0
