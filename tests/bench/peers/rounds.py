"""Rounds: every system in turn, alone, over all cells; again and again in another order.

A noisy phase of the machine then meets all systems, and medians over rounds leave it out.
"""

from __future__ import annotations

import asyncio
import os
import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field

from .system import PeerError, Progress, System
from .workload import Cell

WARM_TOKENS = 4
WARM_SEED = -1
PROOF = Cell("proof", (None,) * 3, prompt=16, output=8)


@dataclass
class Measured:
    """What the rounds found. Figures are tokens a second, one a round."""

    figures: dict[str, dict[str, list[float]]] = field(
        default_factory=lambda: defaultdict(lambda: defaultdict(list))
    )
    """System -> cell -> figures."""
    first_token: dict[str, dict[str, list[float]]] = field(
        default_factory=lambda: defaultdict(lambda: defaultdict(list))
    )
    """System -> cell -> mean seconds to the first token over the streams."""
    missing: dict[str, str] = field(default_factory=dict)
    """System -> why it was not measured, or not to the end."""


def prepare(systems: Sequence[System], found: Measured, progress: Progress) -> None:
    """Installs and converts; a system that cannot be prepared is missing from then on."""
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
    found: Measured,
    progress: Progress,
) -> None:
    """Measures; a system that fails is left out of the rounds that follow."""
    for number in range(repeats):
        for system in turned(systems, number):
            if system.name in found.missing:
                continue
            begun = time.perf_counter()
            try:
                await visit(system, cells, number, found)
            except (PeerError, OSError) as error:
                found.missing[system.name] = str(error)
                progress(f"{system.name}: {error}")
            else:
                took = f"{time.perf_counter() - begun:.0f} s, load {os.getloadavg()[0]:.1f}"
                progress(f"round {number + 1}/{repeats}: {system.name}, {took}")


def turned(systems: Sequence[System], number: int) -> list[System]:
    """The order of a round: each round begins with the next system."""
    first = number % len(systems)
    return [*systems[first:], *systems[:first]]


async def visit(system: System, cells: Sequence[Cell], number: int, found: Measured) -> None:
    """One system's part of a round: start, prove, warm, measure, stop."""
    async with system:
        await prove_adapters(system, cells)
        for cell in cells:
            await ask(system, cell, WARM_SEED - number, min(cell.output, WARM_TOKENS))
        for cell in cells:
            rate, first = await ask(system, cell, number, cell.output)
            found.figures[system.name][cell.name].append(rate)
            found.first_token[system.name][cell.name].append(first)


async def ask(system: System, cell: Cell, seed: int, output: int) -> tuple[float, float]:
    """Tokens a second over all streams of the cell, and their mean seconds to the first token.

    PeerError if a stream is shorter or longer than asked: its figure would compare with nothing.
    """
    prompts = cell.prompts(seed)
    begun = time.perf_counter()
    answers = await asyncio.gather(
        *(
            system.generate(prompt, adapter, output)
            for prompt, adapter in zip(prompts, cell.adapters, strict=True)
        )
    )
    seconds = time.perf_counter() - begun
    for answer in answers:
        if answer.tokens != output:
            raise PeerError(f"{cell.name}: {answer.tokens} tokens generated, {output} asked")
    return cell.counted / seconds, sum(answer.first for answer in answers) / len(answers)


async def prove_adapters(system: System, cells: Sequence[Cell]) -> None:
    """PeerError unless base and the adapters asked for all answer differently.

    A system that ignored adapters would be fast. Random prompts drive models into loops that two
    adapters may share, hence several prompts.
    """
    used = {adapter for cell in cells for adapter in cell.adapters} | {None}
    prompts = PROOF.prompts(0)
    answers = await asyncio.gather(
        *(system.generate(prompt, who, PROOF.output) for who in used for prompt in prompts)
    )
    outputs = [answer.output for answer in answers]
    alike = len(used) - len(set(batched(outputs, len(prompts))))
    if alike:
        raise PeerError(f"{alike} of {len(used) - 1} adapters answer like another: none applied?")


def batched(outputs: Sequence[str], size: int) -> list[tuple[str, ...]]:
    """Runs of `size`."""
    return [tuple(outputs[i : i + size]) for i in range(0, len(outputs), size)]
