"""Bundle: several adapters of any formats in one, lowered to the sum of their programs.

Users know a bundle as a hybrid: adapter_config.json is {"peft_type": "HYBRID", "parts":
[<adapter_config>, ...]}, plus the base's name; tensors of part i are named `parts.<i>.<own name>`.
`adaplex adapters join` writes bundles.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor

from adaplex.adapters.checkpoint import Checkpoint
from adaplex.adapters.errors import AdapterInvalid, Refusal
from adaplex.adapters.formats.base import FormatRow, Lowered
from adaplex.adapters.formats.lowering_context import COMMON_FIELDS, LoweringContext
from adaplex.adapters.limits import AdapterLimits
from adaplex.adapters.program.base_match import FINGERPRINT, NAME
from adaplex.adapters.program.base_spec import BaseSpec
from adaplex.adapters.program.program import AdapterProgram
from adaplex.adapters.program.sum import sum_programs

TYPE = "HYBRID"
USED = frozenset(["peft_type", "parts"])
"""Config fields that change the answer."""
KEY = re.compile(r"parts\.(?P<index>0|[1-9]\d{0,3})\.(?P<name>.+)")
MAX_PARTS = 8

Lower = Callable[[Checkpoint, BaseSpec, AdapterLimits], AdapterProgram]


class Bundle:
    """Format of bundles; see the module's docstring."""

    family = "hybrid"
    semantic_fields = None
    about = FormatRow(
        "Hybrids: any of these together in one adapter",
        (
            "low-rank",
            "bias",
            "output scale",
            "input scale",
            "replaced weight",
            "replaced rows",
            "bottleneck",
            "virtual tokens",
            "KV prefix",
        ),
        "parts whose changes cannot be added: two replaced weights, an input scale beside another "
        "part's pair",
        checkpoint="a directory of type HYBRID, made by `adaplex adapters join`",
    )

    def __init__(self, lower: Lower) -> None:
        """`lower` lowers a part with the part's own format."""
        self._lower = lower

    def lower(self, checkpoint: Checkpoint, base: BaseSpec, limits: AdapterLimits) -> Lowered:
        """See Format."""
        context = LoweringContext(checkpoint, base, limits)
        context.check_fields("a hybrid", USED, COMMON_FIELDS)
        parts = _parts(context)
        context.raise_refusals()
        programs: list[AdapterProgram] = []
        for i, part in enumerate(parts):
            try:
                programs.append(self._lower(part, base, limits))
            except AdapterInvalid as error:
                context.refusals += [
                    Refusal(f"parts[{i}].{r.where}", r.reason) for r in error.refusals
                ]
        context.raise_refusals()
        terms = [(1.0, program) for program in programs]
        made = sum_programs(terms, base, digest="", family="hybrid")
        return Lowered(
            made.modules,
            made.notes,
            made.warnings,
            made.invocation,
            semantics={f"parts.{i}": program.digest for i, program in enumerate(programs)},
        )


def bundle(checkpoints: Sequence[Checkpoint]) -> Checkpoint:
    """Returns a bundle of adapters, which names the base that all parts name, if they agree.

    Raises AdapterInvalid naming `parts`.
    """
    if not 1 <= len(checkpoints) <= MAX_PARTS:
        reason = f"must be 1 to {MAX_PARTS} adapters, not {len(checkpoints)}"
        raise AdapterInvalid.because("parts", reason)
    configs = [checkpoint.config for checkpoint in checkpoints]
    config: dict[str, Any] = {"peft_type": TYPE, "parts": [dict(config) for config in configs]}
    for field in (NAME, FINGERPRINT):
        named = {str(config[field]) for config in configs if config.get(field)}
        if len(named) == 1:
            config[field] = named.pop()
    tensors = {
        f"parts.{i}.{name}": tensor
        for i, checkpoint in enumerate(checkpoints)
        for name, tensor in checkpoint.tensors.items()
    }
    return Checkpoint(config, tensors)


def _parts(context: LoweringContext) -> list[Checkpoint]:
    """Returns the checkpoints of the parts; refuses tensors that belong to no part."""
    configs = context.config.get("parts")
    if not isinstance(configs, list) or not 1 <= len(configs) <= MAX_PARTS:
        context.refuse("parts", f"must be a list of 1 to {MAX_PARTS} adapter configs")
        return []
    for i, config in enumerate(configs):
        if not isinstance(config, dict):
            context.refuse(f"parts[{i}]", "must be an object")
        elif config.get("peft_type") == TYPE:
            context.refuse(f"parts[{i}].peft_type", "a hybrid cannot contain a hybrid")
    tensors: list[dict[str, Tensor]] = [{} for _ in configs]
    for key, tensor in context.tensors.items():
        match = KEY.fullmatch(key)
        if match is None or int(match["index"]) >= len(configs):
            last = len(configs) - 1
            context.refuse(key, f"does not begin with a prefix from parts.0. to parts.{last}.")
        else:
            tensors[int(match["index"])][match["name"]] = tensor
    for i, (config, found) in enumerate(zip(configs, tensors, strict=True)):
        if not found and isinstance(config, dict):
            context.refuse(f"parts[{i}]", "has no tensors")
    pairs = zip(configs, tensors, strict=True)
    return [Checkpoint(config, found) for config, found in pairs if isinstance(config, Mapping)]
