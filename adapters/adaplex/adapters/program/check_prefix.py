"""Checks the positions that an adapter adds before the prompt."""

from __future__ import annotations

from collections.abc import Iterator

from adaplex.adapters.errors import AdapterInvalid, Refusal
from adaplex.adapters.program.base_spec import BaseSpec
from adaplex.adapters.program.program import AdapterProgram


def check_prefix(program: AdapterProgram, base: BaseSpec) -> None:
    """Raises AdapterInvalid if a KV prefix is incomplete, or combined with an invocation.

    Either every attention of the base has keys and values of its shape for every position, or none
    has: an attention without them would read what other requests left in the KV cache.
    """
    refusals: list[Refusal] = []
    if program.prefix_tokens:
        refusals += _incomplete(program, base)
    if program.traits.leading and program.invocation:
        reason = "cannot be combined with positions before the prompt, which precede any invocation"
        refusals.append(Refusal("alora_invocation_tokens", reason))
    if refusals:
        raise AdapterInvalid(refusals)


def _incomplete(program: AdapterProgram, base: BaseSpec) -> Iterator[Refusal]:
    given = {base.modules[m.module].layer: m for m in program.modules if m.prefix is not None}
    for layer, (heads, key, value) in enumerate(base.kv_shapes):
        module = given.pop(layer, None)
        if module is None or module.prefix is None:
            reason = "has no keys and values before the prompt, but other layers do"
            yield Refusal(f"layer {layer}", reason)
            continue
        found = tuple(module.prefix.keys.shape), tuple(module.prefix.values.shape)
        wanted = (program.prefix_tokens, heads, key), (program.prefix_tokens, heads, value)
        if found != wanted:
            reason = "its keys and values before the prompt are {} and {}, expected {} and {}"
            yield Refusal(module.module, reason.format(*found, *wanted))
    for module in given.values():
        yield Refusal(module.module, "is not an attention, so cannot have keys and values")
