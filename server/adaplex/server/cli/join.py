"""`adaplex adapters join`: bundles several adapter directories into one, without a server."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def join(
    parts: Annotated[
        list[Path], typer.Argument(exists=True, file_okay=False, help="Adapter directories.")
    ],
    out: Annotated[Path, typer.Option(help="Folder to write; absent or empty.")],
) -> None:
    """Bundle adapters into one: each part adds its own change, by the rules of its own format.

    The same parts in the same order give the same files. `adaplex adapters push` and
    `adaplex adapters verify` check whether the changes can be added on a base.
    """
    from adaplex.adapters.api import (
        AdapterLimits,
        bundle,
        read_checkpoint,
        write_checkpoint,
    )
    from adaplex.adapters.errors import AdapterError

    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise typer.BadParameter(f"{out} is not empty", param_hint="--out")
    checkpoints = []
    for part in parts:
        try:
            checkpoints.append(read_checkpoint(part, AdapterLimits().for_stored()))
        except AdapterError as error:
            raise typer.BadParameter(f"{part}: {error}", param_hint="PART") from error
    try:
        bundled = bundle(checkpoints)
    except AdapterError as error:
        raise typer.BadParameter(str(error), param_hint="PART") from error
    out.mkdir(parents=True, exist_ok=True)
    write_checkpoint(bundled, out)
    typer.echo(f"{out}: {len(parts)} parts, {len(bundled.tensors)} tensors")
