"""Split: an alias's targets and the share of requests that each gets."""

from __future__ import annotations

import hashlib
import math
import random
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import accumulate

from adaplex.adapters.errors import AdapterInvalid

MAX_TARGETS = 8


@dataclass(frozen=True)
class Target:
    """A version, and its share relative to the other targets."""

    version: int
    weight: float = 1.0


Split = tuple[Target, ...]
"""By version, so that shifting weight between two neighbours moves no request of a third."""


def checked_split(targets: Iterable[Target]) -> Split:
    """Checked targets, by version. Raises AdapterInvalid naming `targets`."""
    split = tuple(sorted(targets, key=lambda target: target.version))
    if not 1 <= len(split) <= MAX_TARGETS:
        raise AdapterInvalid.because("targets", f"must be 1 to {MAX_TARGETS}")
    if len({target.version for target in split}) != len(split):
        raise AdapterInvalid.because("targets", "name a version twice")
    for target in split:
        if not (math.isfinite(target.weight) and 0 < target.weight <= 1e9):
            reason = f"the weight of version {target.version} must be in (0, 1e9]"
            raise AdapterInvalid.because("targets", reason)
    return split


def choose_version(split: Split, key: str, scope: str) -> int:
    """The version for a request.

    The same `key` takes the same version while the weights stay, and a key changes sides only if
    the weight that moved passed over it. `scope` keeps the draws of different aliases apart. An
    empty key draws anew each time.
    """
    draw = _uniform(f"{scope}\0{key}") if key else random.random()
    total = math.fsum(target.weight for target in split)
    bounds = accumulate(target.weight / total for target in split)
    for target, bound in zip(split, bounds, strict=True):
        if draw < bound:
            return target.version
    return split[-1].version


def _uniform(text: str) -> float:
    """A number in [0, 1) that depends on the text alone."""
    digest = hashlib.sha256(text.encode()).digest()
    return (int.from_bytes(digest[:8], "big") >> 11) / float(1 << 53)
