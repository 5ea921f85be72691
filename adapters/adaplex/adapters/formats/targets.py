"""Which modules a PEFT config targets, by PEFT's own rules.

Source: `peft.tuners.tuners_utils.check_target_module_exists` and `peft.utils.get_pattern_key`.
Patterns come from strangers, so they are matched by `regex` with a time limit.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import regex

from adaplex.adapters.errors import AdapterInvalid
from adaplex.adapters.program import BaseModule

ALL_LINEAR = "all-linear"
MAX_PATTERN = 2000
"""Characters of a pattern."""
SECONDS = 0.2
"""For one match."""


def matches(pattern: str, name: str, field: str) -> bool:
    """Whether `pattern` matches the whole name. Raises AdapterInvalid for a bad pattern."""
    if len(pattern) > MAX_PATTERN:
        raise AdapterInvalid.because(field, f"a pattern is longer than {MAX_PATTERN} characters")
    try:
        return regex.fullmatch(pattern, name, timeout=SECONDS) is not None
    except regex.error as error:
        raise AdapterInvalid.because(field, f"{pattern!r:.80} is no pattern: {error}") from None
    except TimeoutError:
        raise AdapterInvalid.because(
            field, f"{pattern!r:.80} takes longer than {SECONDS} s to match"
        ) from None


def targeted(config: Mapping[str, Any], modules: Iterable[BaseModule]) -> frozenset[str]:
    """Names of the linears that the config targets."""
    linears = [module for module in modules if module.kind == "linear"]
    target = config.get("target_modules") or ()
    if isinstance(target, str) and target.lower() == ALL_LINEAR:
        chosen = [module.name for module in linears if not module.is_head]
    elif isinstance(target, str):
        chosen = [m.name for m in linears if matches(target, m.name, "target_modules")]
    else:
        chosen = [m.name for m in linears if _listed(target, m.name)]
        chosen = [name for name in chosen if name in target or _layer_wanted(config, name)]
    return frozenset(name for name in chosen if not _excluded(config, name))


def pattern_value(patterns: Mapping[str, Any] | None, name: str, default: Any, field: str) -> Any:
    """The value of the first pattern that matches the end of a module's name."""
    for pattern, value in (patterns or {}).items():
        if matches(rf"(.*\.)?({pattern})", name, field):
            return value
    return default


def _listed(entries: Iterable[str], name: str) -> bool:
    """Whether an entry is the name, or a whole-word end of it."""
    return any(name == entry or name.endswith(f".{entry}") for entry in entries)


def _excluded(config: Mapping[str, Any], name: str) -> bool:
    excluded = config.get("exclude_modules") or ()
    if isinstance(excluded, str):
        return matches(excluded, name, "exclude_modules")
    return _listed(excluded, name)


def _layer_wanted(config: Mapping[str, Any], name: str) -> bool:
    """Whether layers_to_transform, if given, names the layer that the module lies in."""
    layers = config.get("layers_to_transform")
    if layers is None or layers == []:
        return True
    containers = config.get("layers_pattern") or [r"[^.]*"]
    containers = [containers] if isinstance(containers, str) else containers
    for container in containers:
        pattern = rf"(?:|.*?\.){container}\.(\d+)\..*"
        if matches(pattern, name, "layers_pattern"):
            found = regex.match(pattern, name, timeout=SECONDS)
            assert found is not None
            return int(found[1]) in ([layers] if isinstance(layers, int) else layers)
    return False
