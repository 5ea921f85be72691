"""`adaplex adapters formats`: which adapter families are served, and how."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Annotated

import typer

from adaplex.client.cli import render


def formats(
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """List the adapter families that are served, as what, and what of them is refused."""
    from adaplex.adapters.formats import table  # brings torch, which --help does without

    rows = table.rows()
    if as_json:
        typer.echo(json.dumps([asdict(row) for row in rows], indent=2))
        return
    render.table(
        ("FAMILY", "CHECKPOINT", "SERVED AS", "REFUSED"),
        [(row.title, row.checkpoint, row.served.replace("`", ""), row.refused) for row in rows],
    )
