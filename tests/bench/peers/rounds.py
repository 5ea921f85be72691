"""Rounds: each round measures every system in turn, alone, over all cells, in another order.

A noisy phase of the machine then affects all systems, and medians over rounds exclude it.
"""

from __future__ import annotations

import asyncio
import os
import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field

from .system import PeerError, ReportProgress, System
from .workload import Cell

WARM_TOKENS = 4
WARM_SEED = -1
CHECK = Cell("proof", (None,) * 3, prompt=16, output=8)


@dataclass
class Results:
    """The results of the rounds. Figures are tokens a second, one a round."""

    figures: dict[str, dict[str, list[float]]] = field(
        default_factory=lambda: defaultdict(lambda: defaultdict(list))
    )
    """System -> cell -> figures."""
    first_token: dict[str, dict[str, list[float]]] = field(
        default_factory=lambda: defaultdict(lambda: defaultdict(list))
    )
    """System -> cell -> mean seconds to the first token over the streams."""
    missing: dict[str, str] = field(default_factory=dict)
    """System -> reason why it was not measured, or not in all rounds."""


def prepare(systems: Sequence[System], found: Results, progress: ReportProgress) -> None:
    """Prepares the systems; records one that fails as missing."""
    for system in systems:
        try:
            system.prepare(progress)
        except (PeerError, OSError) as error:
            found.missing[system.name] = str(error)
            progress(f"{system.name}: {error}")


async def run(
    systems: Sequence[System],
    cells: Sequence[Cell],
    repeats: int,
    found: Results,
    progress: ReportProgress,
) -> None:
    """Measures all rounds; a system that fails is skipped in later ones."""
    for number in range(repeats):
        for system in turned(systems, number):
            if system.name in found.missing:
                continue
            started = time.perf_counter()
            try:
                await measure_system(system, cells, number, found)
            except (PeerError, OSError) as error:
                found.missing[system.name] = str(error)
                progress(f"{system.name}: {error}")
            else:
                took = f"{time.perf_counter() - started:.0f} s, load {os.getloadavg()[0]:.1f}"
                progress(f"round {number + 1}/{repeats}: {system.name}, {took}")


def turned(systems: Sequence[System], number: int) -> list[System]:
    """Returns the order of a round: each round begins with the next system."""
    first = number % len(systems)
    return [*systems[first:], *systems[:first]]


async def measure_system(
    system: System, cells: Sequence[Cell], number: int, found: Results
) -> None:
    """Runs one system's part of a round: start, adapter check, warm-up, measurement, stop."""
    async with system:
        await check_adapters(system, cells)
        for cell in cells:
            await run_cell(system, cell, WARM_SEED - number, min(cell.output, WARM_TOKENS))
        for cell in cells:
            rate, first = await run_cell(system, cell, number, cell.output)
            found.figures[system.name][cell.name].append(rate)
            found.first_token[system.name][cell.name].append(first)


async def run_cell(system: System, cell: Cell, seed: int, output: int) -> tuple[float, float]:
    """Runs all streams of a cell; returns tokens a second and mean seconds to the first token.

    Raises PeerError if a stream has another length than `output`: figures could not be compared.
    """
    prompts = cell.prompts(seed)
    started = time.perf_counter()
    answers = await asyncio.gather(
        *(
            system.generate(prompt, adapter, output)
            for prompt, adapter in zip(prompts, cell.adapters, strict=True)
        )
    )
    seconds = time.perf_counter() - started
    for answer in answers:
        if answer.tokens != output:
            raise PeerError(f"{cell.name}: {answer.tokens} tokens generated, {output} asked")
    return cell.counted / seconds, sum(answer.first for answer in answers) / len(answers)


async def check_adapters(system: System, cells: Sequence[Cell]) -> None:
    """Raises PeerError unless the base and all adapters of the cells give different answers.

    A system that ignored adapters would be fast. Several prompts are needed, since random prompts
    drive models into loops that two adapters may share.
    """
    used = {adapter for cell in cells for adapter in cell.adapters} | {None}
    prompts = CHECK.prompts(0)
    answers = await asyncio.gather(
        *(system.generate(prompt, adapter, CHECK.output) for adapter in used for prompt in prompts)
    )
    outputs = [answer.output for answer in answers]
    alike = len(used) - len(set(batched(outputs, len(prompts))))
    if alike:
        raise PeerError(f"{alike} of {len(used) - 1} adapters answer like another: none applied?")


def batched(outputs: Sequence[str], size: int) -> list[tuple[str, ...]]:
    """Splits outputs into groups of `size`."""
    return [tuple(outputs[i : i + size]) for i in range(0, len(outputs), size)]
