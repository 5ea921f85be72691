"""`adaplex adapters`: the life of adapters on the server."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

from adaplex.client import upload
from adaplex.client.cli import render
from adaplex.client.cli.app import connect
from adaplex.client.types import UploadResult

app = typer.Typer(no_args_is_help=True, help="List, send, check and remove adapters.")

Name = Annotated[str, typer.Argument(help="Name of the adapter.")]
Directory = Annotated[
    Path,
    typer.Argument(
        exists=True,
        file_okay=False,
        help="PEFT adapter directory: adapter_config.json and adapter_model.safetensors.",
    ),
]
Replace = Annotated[
    bool, typer.Option("--replace", help="Give a taken name a new version with this content.")
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]


@app.command("ls")
def list_adapters(context: typer.Context, as_json: AsJson = False) -> None:
    """List the stored adapters."""
    with connect(context) as client:
        stored = list(client.adapters.list())
    if as_json:
        typer.echo(render.json_text(stored))
    else:
        render.adapters(stored)


@app.command()
def push(
    context: typer.Context,
    name: Name,
    directory: Directory,
    replace: Replace = False,
    as_json: AsJson = False,
) -> None:
    """Send an adapter directory to the server."""
    with connect(context) as client, _progress(name) as progress:
        result = client.adapters.upload(name, directory, replace=replace, progress=progress)
    _show_stored(result, as_json)


@app.command()
def load(
    context: typer.Context,
    name: Name,
    path: Annotated[str, typer.Argument(help="Directory that the server can read.")],
    replace: Replace = False,
    as_json: AsJson = False,
) -> None:
    """Have the server import a directory of its own, under its allowed roots."""
    with connect(context) as client:
        result = client.adapters.load(name, path, replace=replace)
    _show_stored(result, as_json)


@app.command()
def show(context: typer.Context, name: Name, as_json: AsJson = False) -> None:
    """Show one adapter (name or name@version) and its modules."""
    with connect(context) as client:
        details = client.adapters.get(name)
    if as_json:
        typer.echo(render.json_text(details))
        return
    adapter = details.adapter
    render.fields(
        [
            ("name", f"{adapter.name}@{adapter.version}"),
            ("created", adapter.create_time.isoformat(timespec="seconds")),
            ("stored", render.size(adapter.stored_bytes)),
            ("in memory", "yes" if adapter.resident else "no"),
            ("greatest rank", adapter.max_rank),
        ]
    )
    render.report(details.report)


@app.command()
def verify(context: typer.Context, directory: Directory, as_json: AsJson = False) -> None:
    """Have the server check a directory, storing nothing. Exit code 1 when it would refuse it."""
    with connect(context) as client, _progress(directory.name) as progress:
        checked = client.adapters.validate(directory, progress=progress)
    if as_json:
        typer.echo(render.json_text(checked))
    else:
        render.report(checked.report)
        typer.echo("valid" if checked.valid else "not valid")
    if not checked.valid:
        raise typer.Exit(1)


@app.command()
def unload(context: typer.Context, name: Name) -> None:
    """Drop an adapter from memory. It stays stored."""
    with connect(context) as client:
        was_resident = client.adapters.unload(name)
    typer.echo(f"unloaded {name}" if was_resident else f"{name} was not in memory")


@app.command("rm")
def remove(context: typer.Context, name: Name) -> None:
    """Delete an adapter and all its versions."""
    with connect(context) as client:
        count = client.adapters.delete(name)
    typer.echo(f"deleted {name}, {count} version{'' if count == 1 else 's'}")


def _show_stored(result: UploadResult, as_json: bool) -> None:
    if as_json:
        typer.echo(render.json_text(result))
        return
    stored = result.adapter
    typer.echo(
        f"{stored.name}@{stored.version} {render.short(stored.digest)} "
        f"{stored.family} {stored.modules} modules "
        f"({'stored' if result.created else 'was there already'})"
    )


@contextmanager
def _progress(label: str) -> Iterator[upload.Progress]:
    """A bar on standard error while bytes are sent."""
    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        DownloadColumn(binary_units=True),
        TransferSpeedColumn(),
    )
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(label, total=None)
        yield lambda sent, total: bar.update(task, completed=sent, total=total)
