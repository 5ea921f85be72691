"""Markdown of the generated documents."""

from __future__ import annotations

from collections.abc import Iterable, Sequence


def page(title: str, intro: str, source: str, sections: Iterable[str]) -> str:
    """Returns a page; `source` names the code that it is generated from."""
    note = f"<!-- Generated from {source} by `make docs`; do not edit. -->"
    return "\n\n".join([note, f"# {title}", intro, *sections]) + "\n"


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Returns a table. Cells may hold Markdown; `|` is escaped."""
    lines = [_line(header), "|" + "---|" * len(header)]
    return "\n".join([*lines, *map(_line, rows)])


def code(text: str) -> str:
    """Returns text as code, empty text as nothing."""
    return f"`{text}`" if text else ""


def anchor(heading: str) -> str:
    """Returns the anchor that GitHub gives to a heading."""
    kept = (letter for letter in heading.lower() if letter.isalnum() or letter in " -_")
    return "#" + "".join(kept).replace(" ", "-")


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"
