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
from adaplex.client.cli import adapter_tables, names, render
from adaplex.client.cli.app import connect
from adaplex.client.cli.arguments import AsJson, Name, Replace
from adaplex.client.cli.plugins import AdapterCommands, offline
from adaplex.client.cli.values import labels

app = typer.Typer(
    cls=AdapterCommands, no_args_is_help=True, help="List, send, check, name and remove adapters."
)
for command in (
    *(names.merge, names.history, names.rollback),
    *(names.label, names.describe, names.pin, names.unpin),
):
    app.command()(command)
app.add_typer(names.alias_app, name="alias")

Directory = Annotated[
    Path,
    typer.Argument(
        exists=True,
        file_okay=False,
        help="PEFT adapter directory: adapter_config.json and adapter_model.safetensors.",
    ),
]


@app.command("ls")
def list_adapters(
    context: typer.Context,
    prefix: Annotated[str, typer.Option(help="Names that begin so.")] = "",
    label: Annotated[list[str] | None, typer.Option(help="key=value; repeat.")] = None,
    family: Annotated[str, typer.Option(help="Such as lora.")] = "",
    sort: Annotated[
        str, typer.Option(help="name, create_time, update_time or stored_bytes; then ` desc`.")
    ] = "",
    as_json: AsJson = False,
) -> None:
    """List the stored adapters."""
    with connect(context) as client:
        stored = list(
            client.adapters.list(
                name_prefix=prefix, labels=labels(label or []), family=family, order_by=sort
            )
        )
    if as_json:
        typer.echo(render.json_text(stored))
    else:
        adapter_tables.adapters(stored)


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
    adapter_tables.stored(result, as_json)


@app.command()
def load(
    context: typer.Context,
    name: Name,
    uri: Annotated[
        str, typer.Argument(help="Path on the server, hf://org/repo[@revision] or s3://bucket/x.")
    ],
    replace: Replace = False,
    as_json: AsJson = False,
) -> None:
    """Have the server import an adapter from where it may read."""
    with connect(context) as client:
        result = client.adapters.load(name, uri, replace=replace)
    adapter_tables.stored(result, as_json)


@app.command()
def show(context: typer.Context, name: Name, as_json: AsJson = False) -> None:
    """Show one adapter (name, name@version or name@alias), its versions and its modules."""
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
            ("fastest memory", adapter.tier or "unknown"),
            ("greatest rank", adapter.max_rank),
            ("base fingerprint", adapter.base_fingerprint),
            ("changed", adapter.update_time.isoformat(timespec="seconds")),
            *adapter_tables.name_rows(adapter),
        ]
    )
    adapter_tables.versions(details.versions)
    adapter_tables.report(details.report)


@app.command()
def verify(
    context: typer.Context,
    directory: Directory,
    model: Annotated[
        str | None,
        typer.Option(help="Check here, for this base model as `adaplex serve` takes it."),
    ] = None,
    quantization: Annotated[
        str | None, typer.Option(help="How that base is kept; nf4 if unset.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Explain an adapter directory: what the server would apply, or why it would refuse it.

    Nothing is stored. Exit code 1 when it would be refused. With --model no server is asked.
    """
    if model is not None:
        checked = offline("verify")(directory, model, quantization)
    elif quantization is not None:
        raise typer.BadParameter("--quantization goes with --model")
    else:
        with connect(context) as client, _progress(directory.name) as progress:
            checked = client.adapters.validate(directory, progress=progress)
    if as_json:
        typer.echo(render.json_text(checked))
    else:
        adapter_tables.report(checked.report)
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
    """Delete an adapter and all its versions, or name@version alone."""
    with connect(context) as client:
        count = client.adapters.delete(name)
    typer.echo(f"deleted {name}, {count} version{'' if count == 1 else 's'}")


@contextmanager
def _progress(label: str) -> Iterator[upload.ProgressCallback]:
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
