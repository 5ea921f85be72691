"""Leading positions: whether what an adapter puts before the prompt is whole."""

from __future__ import annotations

from collections.abc import Iterator

from adaplex.adapters.errors import AdapterInvalid, Refusal
from adaplex.adapters.program import AdapterProgram, BaseModule, BaseSpec, KVPrefix


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
    prefixes = {module.module: module.prefix for module in program.modules}
    for module in base.modules.values():
        if module.kind == "block" and module.part == "attention":
            found = prefixes.pop(module.name, None)
            if reason := _difference(found, program.prefix_tokens, module, base):
                yield Refusal(module.name, reason)
    for name, prefix in prefixes.items():
        if prefix is not None:
            yield Refusal(name, "is no attention, and cannot have keys and values")


def _difference(
    prefix: KVPrefix | None, tokens: int, module: BaseModule, base: BaseSpec
) -> str | None:
    if prefix is None:
        return "has no keys and values before the prompt, and other layers do"
    heads, key, value = base.kv_shapes[module.layer]
    found = tuple(prefix.keys.shape), tuple(prefix.values.shape)
    wanted = (tokens, heads, key), (tokens, heads, value)
    if found == wanted:
        return None
    return "its keys and values are {} and {}, the base has {} and {}".format(*found, *wanted)
