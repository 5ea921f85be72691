"""Leading positions: whether what an adapter puts before the prompt is whole."""

from __future__ import annotations

from collections.abc import Iterator

from adaplex.adapters.errors import AdapterInvalid, Refusal
from adaplex.adapters.program.base_spec import BaseSpec
from adaplex.adapters.program.program import AdapterProgram


def check_leading(program: AdapterProgram, base: BaseSpec) -> None:
    """Raises AdapterInvalid unless each attention of the base gets keys and values of its shape for
    every position, or none does: what one leaves out would be whatever the cache holds there.
    """
    refusals: list[Refusal] = []
    if program.prefix_tokens:
        refusals += _incomplete(program, base)
    if program.leading and program.invocation:
        reason = "cannot stand beside positions before the prompt, which come before any invocation"
        refusals.append(Refusal("alora_invocation_tokens", reason))
    if refusals:
        raise AdapterInvalid(refusals)


def _incomplete(program: AdapterProgram, base: BaseSpec) -> Iterator[Refusal]:
    given = {base.modules[m.module].layer: m for m in program.modules if m.prefix is not None}
    for layer, (heads, key, value) in enumerate(base.kv_shapes):
        module = given.pop(layer, None)
        if module is None or module.prefix is None:
            yield Refusal(f"layer {layer}", "has no keys and values before the prompt, others do")
            continue
        found = tuple(module.prefix.keys.shape), tuple(module.prefix.values.shape)
        wanted = (program.prefix_tokens, heads, key), (program.prefix_tokens, heads, value)
        if found != wanted:
            reason = "its keys and values before the prompt are {} and {}, it takes {} and {}"
            yield Refusal(module.module, reason.format(*found, *wanted))
    for module in given.values():
        yield Refusal(module.module, "is no attention, and takes no keys and values")
