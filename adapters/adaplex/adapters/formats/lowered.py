"""Lowered: what a format makes of a checkpoint."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from adaplex.adapters.program.program import ModuleProgram


@dataclass(frozen=True)
class Lowered:
    """Primitives for each module, sorted by name, and what else an AdapterProgram holds."""

    modules: tuple[ModuleProgram, ...]
    notes: tuple[str, ...] = ()
    """What a user may want to know and nobody needs to mend."""
    warnings: tuple[str, ...] = ()
    """Why its answers may not be what its author meant."""
    invocation: tuple[int, ...] = ()
    """Tokens from whose last occurrence in the prompt on the adapter is applied."""
    family: str = ""
    """Instead of the format's own, where one format reads several."""
    semantics: Mapping[str, Any] | None = None
    """What decides the answer beside the tensors; None: the format's `semantic_fields`."""
