"""`adaplex adapters join`: one adapter directory out of several, without a server."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def join(
    parts: Annotated[
        list[Path], typer.Argument(exists=True, file_okay=False, help="Adapter directories.")
    ],
    out: Annotated[Path, typer.Option(help="Folder to write; it must not be there, or be empty.")],
) -> None:
    """Write a hybrid: every part adds its own change, by the rules of its own format.

    The same parts in the same order give the same files. Whether their changes can be added on a
    base is checked where the hybrid is pushed, and by `adaplex adapters verify`.
    """
    from adaplex.adapters.checkpoint import read_checkpoint, write_checkpoint
    from adaplex.adapters.errors import AdapterError
    from adaplex.adapters.formats.bundle import bundle
    from adaplex.adapters.limits import AdapterLimits

    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise typer.BadParameter(f"{out} is not empty", param_hint="--out")
    checkpoints = []
    for part in parts:
        try:
            checkpoints.append(read_checkpoint(part, AdapterLimits().for_stored()))
        except AdapterError as error:
            raise typer.BadParameter(f"{part}: {error}", param_hint="PART") from error
    try:
        made = bundle(checkpoints)
    except AdapterError as error:
        raise typer.BadParameter(str(error), param_hint="PART") from error
    out.mkdir(parents=True, exist_ok=True)
    write_checkpoint(made, out)
    typer.echo(f"{out}: {len(parts)} parts, {len(made.tensors)} tensors")
