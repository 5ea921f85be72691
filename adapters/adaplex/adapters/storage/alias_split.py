"""Split: the targets of an alias, and the share of requests that each gets."""

from __future__ import annotations

import hashlib
import math
import random
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import accumulate, pairwise

from adaplex.adapters.errors import AdapterInvalid

MAX_TARGETS = 8
MAX_WEIGHT = 1e9


@dataclass(frozen=True)
class Target:
    """A version, and its share relative to the other targets."""

    version: int
    weight: float = 1.0


Split = tuple[Target, ...]
"""Targets by version, so that moving weight between two neighbours moves no request of a third."""


def checked_split(targets: Iterable[Target]) -> Split:
    """Returns the targets by version. Raises AdapterInvalid naming `targets`."""
    split = tuple(sorted(targets, key=lambda target: target.version))
    if not 1 <= len(split) <= MAX_TARGETS:
        reason = f"has {len(split)} targets, must have 1 to {MAX_TARGETS}"
        raise AdapterInvalid.because("targets", reason)
    for target, following in pairwise(split):
        if target.version == following.version:
            raise AdapterInvalid.because("targets", f"has version {target.version} twice")
    for target in split:
        if not (math.isfinite(target.weight) and 0 < target.weight <= MAX_WEIGHT):
            reason = (
                f"the weight of version {target.version} is {target.weight:g}, "
                f"must be in (0, {MAX_WEIGHT:g}]"
            )
            raise AdapterInvalid.because("targets", reason)
    return split


def choose_version(split: Split, key: str, scope: str) -> int:
    """Returns the version for a request.

    Requests with the same `key` get the same version while the weights stay; when weights change,
    a key changes version only if its draw lies in the share that moved. `scope` makes the draws of
    different aliases independent. An empty key draws at random each time.
    """
    draw = _uniform(f"{scope}\0{key}") if key else random.random()
    total = math.fsum(target.weight for target in split)
    bounds = accumulate(target.weight / total for target in split)
    for target, bound in zip(split, bounds, strict=True):
        if draw < bound:
            return target.version
    return split[-1].version


def _uniform(text: str) -> float:
    """Returns a number in [0, 1) that depends on the text alone."""
    digest = hashlib.sha256(text.encode()).digest()
    return (int.from_bytes(digest[:8], "big") >> 11) / float(1 << 53)
