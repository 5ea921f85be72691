"""LoraTensors: the tensors of a LoRA checkpoint, sorted by module."""

from __future__ import annotations

import re
from dataclasses import dataclass, field

from torch import Tensor

from adaplex.adapters.formats.lora.parameters import Parameters
from adaplex.adapters.formats.lowering_context import PREFIX, LoweringContext

NESTED = ".base_layer"
"""Key component that PEFT inserts once for each further adapted parameter of a module."""
KEYS = tuple(
    (re.compile(rf"(?P<module>.+?)(?P<nested>({re.escape(NESTED)})*){pattern}"), kind)
    for pattern, kind in (
        (r"\.lora_A(\.default)?\.weight", "a"),
        (r"\.lora_B(\.default)?\.weight", "b"),
        (r"\.lora_B(\.default)?\.bias", "b_bias"),
        (r"\.lora_embedding_A(\.default)?", "table_a"),
        (r"\.lora_embedding_B(\.default)?", "table_b"),
        (r"\.lora_magnitude_vector(\.default)?(\.weight)?", "magnitude"),
        (r"\.token_adapter\.trainable_tokens_delta(\.default)?", "rows"),
        (r"\.modules_to_save(\.default)?\.weight", "weight"),
        (r"\.modules_to_save(\.default)?\.bias", "saved_bias"),
        (r"\.original_module\.weight", "copy"),
        (r"\.original_module\.bias", "copied_bias"),
        (r"\.bias", "bias"),
        (r"\.weight", "weight"),
    )
)
"""Patterns of keys, as PEFT saves them or as in training checkpoints, and the kind of tensor."""


@dataclass
class LoraTensors:
    """Tensors of one module by kind, see KEYS."""

    name: str
    """Name of the module."""
    found: dict[str, Tensor] = field(default_factory=dict)
    keys: dict[str, str] = field(default_factory=dict)
    """Keys in the file, by kind."""

    def get(self, kind: str) -> Tensor | None:
        """Returns the tensor, or None if there is none of this kind."""
        return self.found.get(kind)

    def has(self, *kinds: str) -> bool:
        """True if there is a tensor of any of these kinds."""
        return not self.found.keys().isdisjoint(kinds)

    @property
    def is_pair(self) -> bool:
        """True if there is a low-rank pair, or part of one."""
        return self.has("a", "b", "b_bias", "table_a", "table_b", "magnitude")


def sort_tensors(context: LoweringContext, parameters: Parameters) -> dict[str, LoraTensors]:
    """Returns the tensors by module name; refuses tensors of unknown keys.

    `parameters` maps the pairs stored at the owner of an adapted parameter, by the owner's name and
    nesting depth, to that parameter.
    """
    modules: dict[str, LoraTensors] = {}
    for key, tensor in context.tensors.items():
        name = key.removeprefix(PREFIX)
        if name == key:
            context.refuse(key, f"does not begin with {PREFIX}")
            continue
        module, kind = _match_key(name, parameters)
        if module is None:
            context.refuse(key, "is not a known tensor of LoRA")
            continue
        tensors = modules.setdefault(module, LoraTensors(module))
        if kind in tensors.found:
            context.refuse(key, "is given twice")
        tensors.found[kind], tensors.keys[kind] = tensor, key
    return modules


def _match_key(name: str, parameters: Parameters) -> tuple[str | None, str]:
    """Returns the module that a key belongs to, or None, and the kind of its tensor."""
    matches = ((pattern.fullmatch(name), kind) for pattern, kind in KEYS)
    match, kind = next(((match, kind) for match, kind in matches if match), (None, ""))
    if match is None:
        return None, ""
    module, depth = match["module"], len(match["nested"]) // len(NESTED)
    if kind in ("a", "b") and (module, depth) in parameters:
        return parameters[module, depth].module, kind
    if depth == 0 or (depth == 1 and kind == "bias"):
        return module, kind
    return (module, "copy") if depth == 1 and kind == "weight" else (None, "")
