"""Selects the modules that a PEFT config targets, by PEFT's own rules.

Source: `peft.tuners.tuners_utils.check_target_module_exists` and `peft.utils.get_pattern_key`.
Patterns are untrusted: `re` checks that they are valid, and `regex` matches them within a time
limit.
"""

from __future__ import annotations

import math
import re
import time
from collections.abc import Collection, Iterable, Mapping
from typing import Any

import regex

from adaplex.adapters.errors import AdapterInvalid
from adaplex.adapters.program.base_spec import BaseModule, ModuleKind

ALL_LINEAR = "all-linear"
LINEARS: tuple[ModuleKind, ...] = ("linear",)
MAX_PATTERN = 2000
"""Maximum characters of a pattern."""
MAX_EXPANSION = 200_000
"""Maximum characters of a pattern after expanding its repeats, as `regex` does to compile it."""
MATCH_SECONDS = 0.2
"""Time limit of one match."""
TOTAL_SECONDS = 5.0
"""Limit of processor time for all matches of one adapter."""


class Patterns:
    """Matches one adapter's patterns within limits of time and memory, compiling each once."""

    def __init__(self) -> None:
        self._compiled: dict[str, regex.Pattern[str]] = {}
        self._seconds = 0.0

    def match(
        self, pattern: str, name: str, field: str, *, whole: bool = True
    ) -> regex.Match[str] | None:
        """Matches the whole name, or its beginning. Raises AdapterInvalid for a pattern that is
        invalid or exceeds a limit; `field` is the config field that has the pattern.
        """
        started = time.thread_time()
        try:
            compiled = self._compiled.get(pattern) or self._compile(pattern, field)
            matching = compiled.fullmatch if whole else compiled.match
            found = matching(name, timeout=MATCH_SECONDS)
        except TimeoutError:
            raise AdapterInvalid.because(
                field, f"{pattern!r:.80} takes longer than the limit of {MATCH_SECONDS} s to match"
            ) from None
        self._seconds += time.thread_time() - started
        if self._seconds > TOTAL_SECONDS:
            raise AdapterInvalid.because(
                field, f"its patterns take longer than the limit of {TOTAL_SECONDS} s to match"
            )
        return found

    def _compile(self, pattern: str, field: str) -> regex.Pattern[str]:
        if len(pattern) > MAX_PATTERN:
            raise AdapterInvalid.because(
                field, f"has a pattern of {len(pattern)} characters, the limit is {MAX_PATTERN}"
            )
        try:
            re.compile(pattern)
            if _expansion(pattern) > MAX_EXPANSION:
                reason = f"{pattern!r:.80} has more than {MAX_EXPANSION} characters when expanded"
                raise AdapterInvalid.because(field, reason)
            self._compiled[pattern] = regex.compile(pattern)
        except (re.error, regex.error, ValueError, OverflowError, RecursionError) as error:
            reason = f"{pattern!r:.80} is not a valid pattern: {error}"
            raise AdapterInvalid.because(field, reason) from None
        return self._compiled[pattern]


def targeted(
    config: Mapping[str, Any],
    modules: Iterable[BaseModule],
    patterns: Patterns,
    kinds: Collection[ModuleKind] = LINEARS,
) -> frozenset[str]:
    """Returns the names of the modules of these kinds that the config targets."""
    possible = [module for module in modules if module.kind in kinds]
    target = config.get("target_modules") or ()
    if isinstance(target, str) and target.lower() == ALL_LINEAR:
        chosen = [m.name for m in possible if m.kind == "linear" and not m.is_head]
    elif isinstance(target, str):
        chosen = [m.name for m in possible if patterns.match(target, m.name, "target_modules")]
    else:
        names = frozenset(target)
        chosen = [m.name for m in possible if _listed(names, m.name)]
        chosen = [n for n in chosen if n in names or _in_chosen_layer(config, n, patterns)]
    return frozenset(name for name in chosen if not _excluded(config, name, patterns))


def pattern_value(
    config: Mapping[str, Any], field: str, name: str, default: Any, patterns: Patterns
) -> Any:
    """Returns the value of the field's first pattern that matches the end of a module's name, or
    `default`.
    """
    for pattern, value in (config.get(field) or {}).items():
        if patterns.match(rf"(.*\.)?({pattern})", name, field):
            return value
    return default


def _expansion(pattern: str) -> int:
    """Returns an upper bound of the pattern's length after expanding its repeats: `+` doubles its
    operand, a count multiplies it, and repeats may be nested.
    """
    counts = [
        int(n) for braces in re.findall(r"\{[^}]*", pattern) for n in re.findall(r"\d+", braces)
    ]
    return len(pattern) * (1 << pattern.count("+")) * math.prod(n for n in counts if n)


def _listed(entries: frozenset[str], name: str) -> bool:
    """True if an entry is the name, or consists of its last words."""
    words = name.split(".")
    return any(".".join(words[i:]) in entries for i in range(len(words)))


def _excluded(config: Mapping[str, Any], name: str, patterns: Patterns) -> bool:
    excluded = config.get("exclude_modules") or ()
    if isinstance(excluded, str):
        return patterns.match(excluded, name, "exclude_modules") is not None
    return _listed(frozenset(excluded), name)


def _in_chosen_layer(config: Mapping[str, Any], name: str, patterns: Patterns) -> bool:
    """True if layers_to_transform is unset, or lists the module's layer."""
    layers = config.get("layers_to_transform")
    if layers is None or layers == []:
        return True
    containers = config.get("layers_pattern") or [r"[^.]*"]
    containers = [containers] if isinstance(containers, str) else containers
    for container in containers:
        pattern = rf"(?:^|.*?\.){container}\.(?P<idx>\d+)\."
        if found := patterns.match(pattern, name, "layers_pattern", whole=False):
            chosen = [layers] if isinstance(layers, int) else layers
            return found["idx"] is not None and int(found["idx"]) in chosen
    return False
