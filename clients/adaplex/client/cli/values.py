"""Parsers of command-line values: weighted selectors, shares, labels, numbers and ranges.

All raise typer.BadParameter.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import TypeVar

import typer

DIGEST = "sha256:"
N = TypeVar("N", int, float)


def weighted_selector(text: str) -> tuple[str, float]:
    """Parses `name:0.7` into selector and weight; without a weight it is 1."""
    prefix = DIGEST if text.startswith(DIGEST) else ""
    selector, colon, weight = text.removeprefix(prefix).rpartition(":")
    if not (selector if colon else weight).strip():
        raise typer.BadParameter(f"{text!r} has no adapter name")
    if not colon:
        return text, 1.0
    return prefix + selector, _number(weight, text)


def shares(targets: Iterable[str]) -> dict[int, float]:
    """Parses `3` and `3:95` into versions and shares; without a share it is 1."""
    found: dict[int, float] = {}
    for text in targets:
        version, _, share = text.partition(":")
        if not version.isdecimal():
            raise typer.BadParameter(f"{text!r} is not a version or version:share")
        if int(version) in found:
            raise typer.BadParameter(f"version {int(version)} is given twice")
        found[int(version)] = _number(share, text) if share else 1.0
    return found


def labels(pairs: Iterable[str]) -> dict[str, str]:
    """Parses `key=value` strings into a mapping."""
    found = {}
    for pair in pairs:
        key, equals, value = pair.partition("=")
        if not (key and equals):
            raise typer.BadParameter(f"{pair!r} is not key=value")
        found[key] = value
    return found


def numbers(text: str, kind: type[N] = int) -> tuple[N, ...]:
    """Parses `1,8,16` into numbers of a kind, each above zero."""
    try:
        found = tuple(kind(part) for part in text.split(","))
    except ValueError:
        found = ()
    if not found or not all(0 < number < math.inf for number in found):
        raise typer.BadParameter(f"{text!r} is not numbers above zero, such as 1,8,16")
    return found


def length_range(text: str) -> tuple[int, int]:
    """Parses `8:512`, lengths from 8 to 511, into a half-open range."""
    low, _, high = text.partition(":")
    if not (low.isdecimal() and high.isdecimal() and 0 < int(low) < int(high)):
        raise typer.BadParameter(f"{text!r} is not low:high, such as 8:512")
    return int(low), int(high)


def _number(text: str, whole: str) -> float:
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not math.isfinite(number):
        raise typer.BadParameter(f"{whole!r} does not end in a finite number")
    return number
