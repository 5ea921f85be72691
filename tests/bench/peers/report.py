"""Report: medians and ratios between systems, as text and as JSON."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence

from .rounds import Results
from .workload import Cell, Goal

OURS = "adaplex"
WIDTH = 19
Table = Mapping[str, Mapping[str, float]]
"""System -> cell -> median figure, tokens a second."""


def medians(figures: Mapping[str, Mapping[str, Sequence[float]]]) -> dict[str, dict[str, float]]:
    """Returns the median figure of each system and cell."""
    return {
        system: {cell: statistics.median(values) for cell, values in cells.items()}
        for system, cells in figures.items()
    }


def best(table: Table, peer: str, cell: str) -> float | None:
    """Returns the best figure of a system, or of a family of them ("llama.cpp" includes
    "llama.cpp-bf16"); None if there is none.
    """
    found = [
        cells[cell]
        for system, cells in table.items()
        if (system == peer or system.startswith(f"{peer}-")) and cell in cells
    ]
    return max(found, default=None)


def ratio(table: Table, peer: str, cell: str) -> float | None:
    """Returns adaplex's figure over the peer's best; None if either was not measured."""
    ours, theirs = best(table, OURS, cell), best(table, peer, cell)
    return None if ours is None or theirs is None else ours / theirs


def families(systems: Iterable[str]) -> list[str]:
    """Returns the peers' names without file types, in order."""
    names = dict.fromkeys(name.split("-")[0] for name in systems)
    return [name for name in names if name != OURS]


def text(
    systems: Sequence[str], cells: Sequence[Cell], goals: Sequence[Goal], found: Results
) -> str:
    """Formats the table of medians and ratios, the goals, and the missing systems."""
    table, peers = medians(found.figures), families(systems)
    lines = [_row("tok/s", [*systems, *(f"{OURS}/{peer}" for peer in peers)])]
    for cell in cells:
        figures = [_number(table.get(name, {}).get(cell.name), ".0f") for name in systems]
        ratios = [_number(ratio(table, peer, cell.name), ".2f") for peer in peers]
        lines.append(_row(cell.name, [*figures, *ratios]))
    for goal in goals:
        if (reached := ratio(table, goal.peer, goal.cell)) is not None:
            verdict = "reached" if reached >= goal.factor else "not reached"
            lines.append(
                f"{goal.cell}: {reached:.2f} times {goal.peer}, {goal.factor:g} wanted: {verdict}"
            )
    lines += [f"missing: {system}: {reason}" for system, reason in found.missing.items()]
    return "\n".join(lines)


def record(cells: Sequence[Cell], found: Results) -> dict[str, object]:
    """Returns all figures, for JSON."""
    table = medians(found.figures)
    return {
        "tokens_per_second": found.figures,
        "first_token_seconds": found.first_token,
        "medians": table,
        "ratios": {
            peer: {cell.name: ratio(table, peer, cell.name) for cell in cells}
            for peer in families(found.figures)
        },
        "missing": found.missing,
    }


def _row(name: str, values: Sequence[str]) -> str:
    return f"{name:<16}" + "".join(f"{value:>{WIDTH}}" for value in values)


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)
