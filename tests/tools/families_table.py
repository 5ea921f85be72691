"""Writes the table of families between the markers of a Markdown file.

`make formats` rewrites the table of the README; a test checks that it is current.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

from adaplex.adapters.formats.table import TableRow, rows

BEGIN, END = "<!-- formats:begin -->", "<!-- formats:end -->"


def markdown() -> str:
    """Returns the table; families that are served and refused alike share a line."""
    return "\n".join(_lines(rows()))


def rewritten(text: str) -> str:
    """Returns the text with a new table between its markers. Raises ValueError without markers."""
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
    """Rewrites the table in each file named on the command line."""
    for name in sys.argv[1:]:
        path = Path(name)
        path.write_text(rewritten(path.read_text()))


if __name__ == "__main__":
    main()
