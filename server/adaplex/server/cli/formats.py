"""`adaplex adapters formats` and `verify`: list families, check a directory, without a server."""

from __future__ import annotations

import json
from dataclasses import asdict, fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from adaplex.client.adapter_types import AdapterReport, ModuleReport, Refusal, Validation
from adaplex.client.cli import render

if TYPE_CHECKING:
    from adaplex.adapters.api import Report


def formats(
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """List the adapter families: as which primitives each is served, and what is refused."""
    from adaplex.adapters.api import format_rows  # imports torch, which --help does not need

    rows = format_rows()
    if as_json:
        typer.echo(json.dumps([asdict(row) for row in rows], indent=2))
        return
    render.table(
        ("FAMILY", "CHECKPOINT", "SERVED AS", "REFUSED"),
        [(row.title, row.checkpoint, row.served.replace("`", ""), row.refused) for row in rows],
    )


def verify(directory: Path, model: str, quantization: str | None) -> Validation:
    """Returns the report that a server of this base would give on an adapter directory."""
    from adaplex.adapters.api import Report, describe  # imports torch
    from adaplex.adapters.errors import AdapterInvalid, AdapterTooLarge
    from adaplex.server.offline_base import OfflineBase, errors_as_messages

    with errors_as_messages():
        offline = OfflineBase.of({"model": model, "quantization": quantization})
    try:
        program = offline.read(directory)
    except AdapterInvalid as error:
        return _validation(Report(), [Refusal(r.where, r.reason) for r in error.refusals])
    except AdapterTooLarge as error:
        return _validation(Report(), [Refusal(error.field, str(error))])
    return _validation(describe(program, offline.base.spec, offline.base.dtype.itemsize), [])


def _validation(report: Report, refusals: list[Refusal]) -> Validation:
    """Converts a report to the client's types."""
    converted = AdapterReport(
        family=report.family,
        digest=report.digest,
        modules=tuple(
            ModuleReport(**{f.name: getattr(m, f.name) for f in fields(ModuleReport)})
            for m in report.modules
        ),
        packed_bytes=report.packed_bytes,
        refusals=tuple(refusals),
        notes=report.notes,
        warnings=report.warnings,
        prefix_tokens=report.prefix_tokens,
        virtual_tokens=report.virtual_tokens,
        invocation_tokens=report.traits.invocation,
        merged_only=report.traits.merged_only,
        merged_bytes=report.merged_bytes,
    )
    return Validation(not refusals, converted)
