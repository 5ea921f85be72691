"""Format: the interface of one adapter family, and the types that it returns."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from adaplex.adapters.checkpoint import Checkpoint
from adaplex.adapters.limits import AdapterLimits
from adaplex.adapters.program.base_spec import BaseSpec
from adaplex.adapters.program.program import ModuleProgram


@dataclass(frozen=True)
class FormatRow:
    """One row of the table of families, which `adaplex adapters formats` and the README show."""

    title: str
    """Names of the methods, as their authors write them."""
    primitives: tuple[str, ...]
    """Primitives that the family is served as, by their names in ModuleProgram.primitives."""
    refused: str = ""
    """Variants of the family that are refused."""
    extra: str = ""
    """Package that must be installed, such as `adaplex[peft]`."""
    checkpoint: str = ""
    """Layout of the files, where it is not a PEFT directory."""


@dataclass(frozen=True)
class Lowered:
    """Result of lowering a checkpoint: fields of an AdapterProgram, modules sorted by name."""

    modules: tuple[ModuleProgram, ...]
    notes: tuple[str, ...] = ()
    """Facts for the user that need no action."""
    warnings: tuple[str, ...] = ()
    """Reasons why the answers may differ from what the adapter's author meant."""
    invocation: tuple[int, ...] = ()
    """Tokens from whose last occurrence in the prompt on the adapter is applied."""
    family: str = ""
    """Family, where one format reads several; empty: the format's own."""
    semantics: Mapping[str, Any] | None = None
    """Values that decide the answer beside the tensors; None: the format's `semantic_fields`."""


class Format(Protocol):
    """Reads the checkpoints of one family."""

    family: str
    about: FormatRow

    @property
    def semantic_fields(self) -> frozenset[str] | None:
        """Config fields that change the answer, and so enter the digest. None where only lowering
        can determine them; then `Lowered.semantics` holds them.
        """
        ...

    def lower(self, checkpoint: Checkpoint, base: BaseSpec, limits: AdapterLimits) -> Lowered:
        """Lowers a checkpoint. Raises AdapterInvalid with every refusal, or AdapterTooLarge."""
        ...
