"""Rows of the table of families: which are served and how, from the formats themselves."""

from __future__ import annotations

from dataclasses import dataclass

from adaplex.adapters.formats.families import FORMATS, NEEDS


@dataclass(frozen=True)
class TableRow:
    """One family, served or not."""

    family: str
    """Name in reports and metrics; empty for a family that is not served."""
    title: str
    checkpoint: str
    """Layout of the files, such as `PEFT LORA`."""
    primitives: tuple[str, ...]
    """Primitives that the family is served as; empty for a family that is not served."""
    extra: str
    """Package that must be installed, such as `adaplex[peft]`."""
    refused: str
    """Variants that are refused, or what serving the family would need."""

    @property
    def served(self) -> str:
        """How the family is served, in words."""
        by = f" by `{self.extra}`" if self.extra else ""
        return ", ".join(self.primitives) + by if self.primitives else "not served"


def rows() -> tuple[TableRow, ...]:
    """Returns the served families, those that need an extra last, then those not served."""
    served = [
        TableRow(
            found.family,
            found.about.title,
            found.about.checkpoint or f"PEFT {kind}",
            found.about.primitives,
            found.about.extra,
            found.about.refused,
        )
        for kind, found in FORMATS.items()
    ]
    unserved = (
        TableRow("", kind, f"PEFT {kind}", (), "", f"needs {need}") for kind, need in NEEDS.items()
    )
    return (*sorted(served, key=lambda row: bool(row.extra)), *unserved)
