"""Prefix tuning and cartridges as HF PEFT 0.21 writes them: keys and values before the first token,
in every layer.

A row of the saved tensor has the keys and values of one virtual token, layer by layer, the keys of
all heads before the values. They are written to the KV cache unchanged, without positions. PEFT
applies a trained projection before saving.
"""

from __future__ import annotations

from collections.abc import Iterable

from adaplex.adapters.checkpoint import Checkpoint
from adaplex.adapters.formats.base import FormatRow, Lowered
from adaplex.adapters.formats.lowering_context import LoweringContext
from adaplex.adapters.formats.peft.prompt import (
    HARMLESS,
    LEARNED,
    TOKENS,
    USED,
    check_size,
    check_virtual_tokens,
    lower_saved_modules,
    sorted_by_module,
)
from adaplex.adapters.limits import AdapterLimits
from adaplex.adapters.program.base_spec import BaseSpec
from adaplex.adapters.program.primitives import KVPrefix
from adaplex.adapters.program.program import ModuleProgram


class PrefixTuning:
    """Format of prefix tuning and cartridges; see the module's docstring."""

    semantic_fields = USED

    def __init__(self, family: str, title: str, training_fields: Iterable[str]) -> None:
        """`training_fields` are config fields that only training reads."""
        self.family = family
        self.about = FormatRow(
            title, ("KV prefix", "replaced weight"), "layers of different shapes"
        )
        self._harmless = HARMLESS | {"init_weights", *training_fields}

    def lower(self, checkpoint: Checkpoint, base: BaseSpec, limits: AdapterLimits) -> Lowered:
        """See Format."""
        context = LoweringContext(checkpoint, base, limits)
        context.check_fields(self.family, USED | LEARNED, self._harmless)
        count = check_virtual_tokens(context)
        blocks = _attention(context)
        heads, features = _shape(context)
        whole = lower_saved_modules(context, self.family, [TOKENS])
        check_size(context, "num_layers", len(blocks))
        check_size(context, "num_attention_heads", heads)
        check_size(context, "token_dim", heads * features)
        saved = context.tensors[TOKENS]
        context.check_shape(TOKENS, saved, count, len(blocks) * 2 * heads * features)
        context.raise_refusals()
        states = saved.float().view(count, len(blocks), 2, heads, features)
        prefixes = (
            ModuleProgram(name, prefix=KVPrefix(states[:, layer, 0], states[:, layer, 1]))
            for layer, name in enumerate(blocks)
        )
        return Lowered(sorted_by_module([*prefixes, *whole]))


def _attention(context: LoweringContext) -> list[str]:
    """Returns the names of the attention blocks by layer; refuses a base that lacks one."""
    modules = context.base.modules.values()
    blocks = {m.layer: m.name for m in modules if m.kind == "block" and m.part == "attention"}
    layers = range(len(context.base.kv_shapes))
    if not blocks or sorted(blocks) != list(layers):
        name = context.base.name
        reason = f"needs an attention block in every layer, which {name} does not have"
        context.refuse("peft_type", reason)
    return [blocks[layer] for layer in sorted(blocks)]


def _shape(context: LoweringContext) -> tuple[int, int]:
    """Returns the heads and features of keys and values; refuses a base where they differ between
    layers, or between keys and values.
    """
    shapes = set(context.base.kv_shapes)
    if len(shapes) == 1:
        heads, keys, values = shapes.pop()
        if keys == values:
            return heads, keys
    if context.base.kv_shapes:
        context.refuse("peft_type", "needs keys and values of one shape in all layers")
    return 0, 0
