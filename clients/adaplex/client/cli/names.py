"""`adaplex adapters`: what names stand for: aliases, labels, pins, history, merges."""

from __future__ import annotations

from typing import Annotated

import typer

from adaplex.client.adapter_types import Adapter
from adaplex.client.cli import adapter_tables, render
from adaplex.client.cli.app import connect
from adaplex.client.cli.arguments import AsJson, Name, Replace
from adaplex.client.cli.values import labels, shares, weighted_selector

alias_app = typer.Typer(no_args_is_help=True, help="Set and remove aliases.")

Alias = Annotated[str, typer.Argument(help="Alias; the bare name follows `default`.")]


@alias_app.command("set")
def set_alias(
    context: typer.Context,
    name: Name,
    alias: Alias,
    targets: Annotated[
        list[str], typer.Argument(help="A version, or several with shares: 3:95 4:5.")
    ],
    as_json: AsJson = False,
) -> None:
    """Point an alias to a version, or to several by share."""
    with connect(context) as client:
        _show(client.adapters.set_alias(name, alias, shares(targets)), as_json)


@alias_app.command("rm")
def delete_alias(context: typer.Context, name: Name, alias: Alias, as_json: AsJson = False) -> None:
    """Forget an alias."""
    with connect(context) as client:
        _show(client.adapters.delete_alias(name, alias), as_json)


def rollback(
    context: typer.Context,
    name: Name,
    alias: Annotated[str, typer.Argument(help="Alias to roll back.")] = "default",
    as_json: AsJson = False,
) -> None:
    """Point an alias to what it pointed to before its last change."""
    with connect(context) as client:
        _show(client.adapters.rollback(name, alias), as_json)


def label(
    context: typer.Context,
    name: Name,
    pairs: Annotated[list[str] | None, typer.Argument(help="key=value to set.")] = None,
    remove: Annotated[list[str] | None, typer.Option(help="Key to remove; repeat.")] = None,
    as_json: AsJson = False,
) -> None:
    """Set and remove labels."""
    if not (pairs or remove):
        raise typer.BadParameter("give key=value, or --remove key")
    with connect(context) as client:
        changed = client.adapters.update(
            name, set_labels=labels(pairs or []), remove_labels=remove or []
        )
    _show(changed, as_json)


def describe(
    context: typer.Context,
    name: Name,
    text: Annotated[str, typer.Argument(help="What the adapter is for.")],
    as_json: AsJson = False,
) -> None:
    """Describe an adapter."""
    with connect(context) as client:
        _show(client.adapters.update(name, description=text), as_json)


def pin(context: typer.Context, name: Name, as_json: AsJson = False) -> None:
    """Keep an adapter in device memory."""
    with connect(context) as client:
        _show(client.adapters.update(name, pinned=True), as_json)


def unpin(context: typer.Context, name: Name, as_json: AsJson = False) -> None:
    """Let an adapter leave device memory again."""
    with connect(context) as client:
        _show(client.adapters.update(name, pinned=False), as_json)


def history(context: typer.Context, name: Name, as_json: AsJson = False) -> None:
    """Show what happened to a name, newest first; also to a deleted one."""
    with connect(context) as client:
        events = client.adapters.history(name)
    if as_json:
        typer.echo(render.json_text(list(events)))
    else:
        adapter_tables.history(events)


def merge(
    context: typer.Context,
    name: Name,
    sources: Annotated[list[str], typer.Argument(help="Adapters as selector:weight.")],
    method: Annotated[
        str, typer.Option(help="linear, cat, svd, ties, dare_linear, dare_ties, *_svd, ...")
    ] = "linear",
    density: Annotated[float | None, typer.Option(help="Share of values to keep.")] = None,
    rank: Annotated[int | None, typer.Option(min=1, help="Of an SVD's result.")] = None,
    seed: Annotated[int | None, typer.Option(min=0, help="Of what dare drops.")] = None,
    majority_sign: Annotated[
        str, typer.Option(help="total or frequency: how ties elects a sign.")
    ] = "",
    replace: Replace = False,
    as_json: AsJson = False,
) -> None:
    """Make a new adapter out of stored ones."""
    weighted = [weighted_selector(source) for source in sources]
    with connect(context) as client:
        result = client.adapters.merge(
            name,
            weighted,
            method=method,
            density=density,
            rank=rank,
            seed=seed,
            majority_sign=majority_sign,
            replace=replace,
        )
    adapter_tables.stored(result, as_json)


def _show(adapter: Adapter, as_json: bool) -> None:
    if as_json:
        typer.echo(render.json_text(adapter))
    else:
        adapter_tables.named(adapter)
