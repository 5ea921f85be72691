"""The table of families: what is served and how, from the formats themselves.

`python -m adaplex.adapters.formats.table README.md` writes it between the markers of a file.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from adaplex.adapters.formats import FORMATS, NEEDS

BEGIN, END = "<!-- formats:begin -->", "<!-- formats:end -->"


@dataclass(frozen=True)
class TableRow:
    """A family that is served, or is not."""

    family: str
    """As reports and metrics name it; empty for one that is not served."""
    title: str
    checkpoint: str
    primitives: tuple[str, ...]
    extra: str
    """What must be installed for it."""
    refused: str
    """What of it is refused, or what serving it would need."""

    @property
    def served(self) -> str:
        """How it is served, in words."""
        by = f" by `{self.extra}`" if self.extra else ""
        return ", ".join(self.primitives) + by if self.primitives else "not served"


def rows() -> tuple[TableRow, ...]:
    """The families that are served, those by an extra last, then those that are not."""
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


def markdown() -> str:
    """The table; families that are served and refused alike share a line."""
    return "\n".join(_lines(rows()))


def rewritten(text: str) -> str:
    """The text with the table of now between its markers. Raises ValueError without markers."""
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not (begin and end):
        raise ValueError(f"there is no {BEGIN} before an {END}")
    return f"{before}{BEGIN}\n{markdown()}\n{END}{after}"


def _lines(entries: Iterable[TableRow]) -> Iterator[str]:
    yield "| family | served as | refused |"
    yield "|---|---|---|"
    alike: dict[tuple[str, str], list[str]] = {}
    for row in entries:
        alike.setdefault((row.served, row.refused), []).append(row.title)
    for (served, refused), titles in alike.items():
        yield f"| {', '.join(titles)} | {served} | {refused} |"


def main() -> None:
    """Rewrites the table of the files that the command line names."""
    for name in sys.argv[1:]:
        path = Path(name)
        path.write_text(rewritten(path.read_text()))


if __name__ == "__main__":
    main()
