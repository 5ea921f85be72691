"""LoraTensors: what a LoRA checkpoint holds for each module of the base."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import Tensor

from adaplex.adapters.formats.lora.parameters import Place
from adaplex.adapters.formats.lowering_context import PREFIX, LoweringContext

NESTED = ".base_layer"
"""What PEFT puts between a module and its tensors for each parameter of it that is adapted more."""
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
"""Ends of keys, as PEFT saves them or as they are in training, and what is kept under them."""


@dataclass
class LoraTensors:
    """The tensors of one module by kind, see KEYS."""

    name: str
    """Of the module."""
    found: dict[str, Tensor] = field(default_factory=dict)
    keys: dict[str, str] = field(default_factory=dict)
    """By kind, as they are in the file."""

    def get(self, kind: str) -> Tensor | None:
        """The tensor, if it is there."""
        return self.found.get(kind)

    def has(self, *kinds: str) -> bool:
        """Whether one of them is there."""
        return not self.found.keys().isdisjoint(kinds)

    @property
    def is_pair(self) -> bool:
        """Whether there is a low-rank pair, or part of one."""
        return self.has("a", "b", "b_bias", "table_a", "table_b", "magnitude")


def sort_tensors(
    context: LoweringContext, parameters: Mapping[tuple[str, int], Place]
) -> dict[str, LoraTensors]:
    """Name of a module -> its tensors; refuses tensors that fit no place.

    `parameters` tells whose the pairs are that PEFT keeps at the module that owns a parameter:
    name of the owner, and how deep they are nested there.
    """
    modules: dict[str, LoraTensors] = {}
    for key, tensor in context.tensors.items():
        name = key.removeprefix(PREFIX)
        if name == key:
            context.refuse(key, f"does not begin with {PREFIX}")
            continue
        module, kind = _place(name, parameters)
        if module is None:
            context.refuse(key, "is not a tensor of LoRA that this server knows")
            continue
        tensors = modules.setdefault(module, LoraTensors(module))
        if kind in tensors.found:
            context.refuse(key, "is given twice")
        tensors.found[kind], tensors.keys[kind] = tensor, key
    return modules


def _place(name: str, parameters: Mapping[tuple[str, int], Place]) -> tuple[str | None, str]:
    """Whose a tensor is, and what it is to it."""
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
