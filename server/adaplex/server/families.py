"""`adaplex adapters formats`: which adapter families are served, and how."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

PIPE_WIDTH = 240
"""Columns when the output is no terminal."""


def formats(
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """List the adapter families that are served, as what, and what of them is refused."""
    from adaplex.adapters.formats import table  # brings torch, which --help does without

    rows = table.rows()
    if as_json:
        typer.echo(json.dumps([asdict(row) for row in rows], indent=2))
        return
    shown = Table(box=None, pad_edge=False, header_style="bold")
    for column in ("FAMILY", "CHECKPOINT", "SERVED AS", "REFUSED"):
        shown.add_column(column, overflow="fold")
    for row in rows:
        shown.add_row(row.title, row.checkpoint, row.served.replace("`", ""), row.refused)
    width = None if sys.stdout.isatty() else PIPE_WIDTH
    Console(width=width, highlight=False, markup=False).print(shown)
