"""Reads an adapter directory for one base: lowering, checks against the base, and a trial merge."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from adaplex.adapters import formats
from adaplex.adapters.checkpoint import Checkpoint, read_checkpoint
from adaplex.adapters.errors import AdapterInvalid, Refusal
from adaplex.adapters.limits import AdapterLimits
from adaplex.adapters.program.base_match import BasePolicy, agreement, mismatches
from adaplex.adapters.program.base_spec import BaseSpec
from adaplex.adapters.program.check_prefix import check_prefix
from adaplex.adapters.program.primitives import Transform
from adaplex.adapters.program.program import AdapterProgram

TRIAL_SECONDS = 30.0
"""Time after which a trial merge skips modules of a shape that has merged."""


def read_adapter(
    directory: Path, base: BaseSpec, limits: AdapterLimits, policy: BasePolicy
) -> AdapterProgram:
    """Lowers an adapter directory, and merges on trial what can only be served merged.

    An adapter whose values cannot be merged is thus refused at its upload, not at its first
    request. Raises AdapterInvalid with every refusal, or AdapterTooLarge.
    """
    checkpoint = read_checkpoint(directory, limits)
    program = lower_checkpoint(checkpoint, base, limits)
    _try_merging(program, base)
    if policy is BasePolicy.OFF:
        return program
    found = mismatches(checkpoint.config, base)
    if found and policy is BasePolicy.REFUSE:
        raise AdapterInvalid([Refusal(*pair) for pair in found])
    warnings = tuple(f"{where} {how}" for where, how in found)
    return replace(program, warnings=(*program.warnings, *warnings))


def lower_checkpoint(
    checkpoint: Checkpoint, base: BaseSpec, limits: AdapterLimits
) -> AdapterProgram:
    """Lowers a checkpoint, noting whether it names this base.

    Raises AdapterInvalid with every refusal, or AdapterTooLarge.
    """
    program = formats.lower(checkpoint, base, limits)
    check_prefix(program, base)
    if mismatches(checkpoint.config, base):
        return program
    return replace(program, notes=(*program.notes, agreement(checkpoint.config)))


def _try_merging(program: AdapterProgram, base: BaseSpec) -> None:
    """Merges each module with the base's weight and drops the result.

    At least one module of each shape is merged. Raises AdapterInvalid with every refusal.
    """
    started, seen = time.monotonic(), set[tuple[int, int]]()
    refusals: list[Refusal] = []
    for name, transform in _transforms(program):
        shape = base.modules[name].in_features, base.modules[name].out_features
        if shape in seen and time.monotonic() - started > TRIAL_SECONDS:
            continue
        seen.add(shape)
        try:
            transform(base.weight(name))
        except AdapterInvalid as error:
            for refusal in error.refusals:
                where = name if refusal.where == name else f"{name} {refusal.where}"
                refusals.append(Refusal(where, refusal.reason))
    if refusals:
        raise AdapterInvalid(refusals)


def _transforms(program: AdapterProgram) -> Iterator[tuple[str, Transform]]:
    for module in program.modules:
        if module.transform is not None:
            yield module.module, module.transform
