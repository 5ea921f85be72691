"""`adaplex adapters`: list, upload, import, check, unload and delete adapters."""

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
from adaplex.client.cli.commands import COMMANDS
from adaplex.client.cli.plugins import AdapterCommands, offline
from adaplex.client.cli.values import labels

app = typer.Typer(
    cls=AdapterCommands,
    no_args_is_help=True,
    rich_markup_mode=None,
    help=COMMANDS["adapters"],
)
for command in (
    names.merge,
    names.history,
    names.rollback,
    names.label,
    names.describe,
    names.pin,
    names.unpin,
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
    prefix: Annotated[str, typer.Option(help="Only names with this prefix.")] = "",
    label: Annotated[
        list[str] | None, typer.Option(help="Only with this label, as key=value; repeatable.")
    ] = None,
    family: Annotated[str, typer.Option(help="Only of this family, such as lora.")] = "",
    sort: Annotated[
        str,
        typer.Option(
            help="name, create_time, update_time or stored_bytes, optionally with ` desc` after it."
        ),
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
    """Upload an adapter directory."""
    with connect(context) as client, _progress(name) as progress:
        result = client.adapters.upload(name, directory, replace=replace, progress=progress)
    adapter_tables.upload_result(result, as_json)


@app.command()
def load(
    context: typer.Context,
    name: Name,
    uri: Annotated[
        str,
        typer.Argument(
            help="Path on the server, hf://org/repo[/folder][@revision] or s3://bucket/prefix."
        ),
    ],
    replace: Replace = False,
    as_json: AsJson = False,
) -> None:
    """Import an adapter from a place that the server may read."""
    with connect(context) as client:
        result = client.adapters.load(name, uri, replace=replace)
    adapter_tables.upload_result(result, as_json)


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
        typer.Option(help="Check on this machine, for this base model, as for `adaplex serve`."),
    ] = None,
    quantization: Annotated[
        str | None, typer.Option(help="Quantization of that base; nf4 by default.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Report what the server would apply of an adapter directory, or why it would refuse it.

    Stores nothing. The exit code is 1 for a refusal. With --model no server is needed.
    """
    if model is not None:
        checked = offline("verify")(directory, model, quantization)
    elif quantization is not None:
        raise typer.BadParameter("--quantization needs --model")
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
    """Evict an adapter from memory. It stays stored."""
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
    """Shows a progress bar on standard error; yields the callback that advances it."""
    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        DownloadColumn(binary_units=True),
        TransferSpeedColumn(),
    )
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(label, total=None)
        yield lambda sent, total: bar.update(task, completed=sent, total=total)
