"""Trial: merges what can only be merged once, so that an adapter whose values cannot be is refused
when it comes, not when it is first asked for.
"""

from __future__ import annotations

import time
from collections.abc import Iterator

from adaplex.adapters.errors import AdapterInvalid, Refusal
from adaplex.adapters.program.base_spec import BaseSpec
from adaplex.adapters.program.primitives import Transform
from adaplex.adapters.program.program import AdapterProgram

SECONDS = 30.0
"""After which modules that are like one that was tried are taken as they are."""


def try_merging(program: AdapterProgram, base: BaseSpec) -> None:
    """Merges into the base's weights, one module at a time, keeping nothing. One module of each
    shape is always tried. Raises AdapterInvalid with every refusal.
    """
    started, seen = time.monotonic(), set[tuple[int, int]]()
    refusals: list[Refusal] = []
    for name, transform in _transforms(program):
        shape = base.modules[name].in_features, base.modules[name].out_features
        if shape in seen and time.monotonic() - started > SECONDS:
            continue
        seen.add(shape)
        try:
            transform(base.weight(name))
        except AdapterInvalid as error:
            refusals += (Refusal(f"{name} {r.where}", r.reason) for r in error.refusals)
    if refusals:
        raise AdapterInvalid(refusals)


def _transforms(program: AdapterProgram) -> Iterator[tuple[str, Transform]]:
    for module in program.modules:
        if module.transform is not None:
            yield module.module, module.transform
