"""`adaplex adapters`: aliases, labels, descriptions, pins, history and merges."""

from __future__ import annotations

from typing import Annotated

import typer

from adaplex.client.adapter_types import Adapter
from adaplex.client.cli import adapter_tables, render
from adaplex.client.cli.app import connect
from adaplex.client.cli.arguments import AsJson, Name, Replace
from adaplex.client.cli.values import labels, shares, weighted_selector

alias_app = typer.Typer(no_args_is_help=True, rich_markup_mode=None, help="Set and remove aliases.")

Alias = Annotated[str, typer.Argument(help="Alias; the bare name follows `default`.")]


@alias_app.command("set")
def set_alias(
    context: typer.Context,
    name: Name,
    alias: Alias,
    targets: Annotated[
        list[str], typer.Argument(help="A version, or versions with shares: 3:95 4:5.")
    ],
    as_json: AsJson = False,
) -> None:
    """Point an alias to a version, or to several versions by share."""
    with connect(context) as client:
        _show(client.adapters.set_alias(name, alias, shares(targets)), as_json)


@alias_app.command("rm")
def delete_alias(context: typer.Context, name: Name, alias: Alias, as_json: AsJson = False) -> None:
    """Delete an alias."""
    with connect(context) as client:
        _show(client.adapters.delete_alias(name, alias), as_json)


def rollback(
    context: typer.Context,
    name: Name,
    alias: Annotated[str, typer.Argument(help="Alias to roll back.")] = "default",
    as_json: AsJson = False,
) -> None:
    """Restore the targets that an alias had before its last change."""
    with connect(context) as client:
        _show(client.adapters.rollback(name, alias), as_json)


def label(
    context: typer.Context,
    name: Name,
    pairs: Annotated[list[str] | None, typer.Argument(help="key=value to set.")] = None,
    remove: Annotated[list[str] | None, typer.Option(help="Key to remove; repeatable.")] = None,
    as_json: AsJson = False,
) -> None:
    """Set and remove labels."""
    if not (pairs or remove):
        raise typer.BadParameter("give key=value or --remove key")
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
    """Set an adapter's description."""
    with connect(context) as client:
        _show(client.adapters.update(name, description=text), as_json)


def pin(context: typer.Context, name: Name, as_json: AsJson = False) -> None:
    """Keep an adapter in device memory."""
    with connect(context) as client:
        _show(client.adapters.update(name, pinned=True), as_json)


def unpin(context: typer.Context, name: Name, as_json: AsJson = False) -> None:
    """Allow an adapter's eviction from device memory again."""
    with connect(context) as client:
        _show(client.adapters.update(name, pinned=False), as_json)


def history(context: typer.Context, name: Name, as_json: AsJson = False) -> None:
    """Show the changes of a name, newest first; also of a deleted name."""
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
    density: Annotated[
        float | None,
        typer.Option(help="Fraction of values that ties, dare and magnitude_prune keep."),
    ] = None,
    rank: Annotated[int | None, typer.Option(min=1, help="Rank of an svd method's result.")] = None,
    seed: Annotated[
        int | None, typer.Option(min=0, help="Seed of the values that dare drops.")
    ] = None,
    majority_sign: Annotated[
        str, typer.Option(help="How ties elects a sign: total or frequency.")
    ] = "",
    replace: Replace = False,
    as_json: AsJson = False,
) -> None:
    """Merge stored adapters into a new one."""
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
    adapter_tables.upload_result(result, as_json)


def _show(adapter: Adapter, as_json: bool) -> None:
    if as_json:
        typer.echo(render.json_text(adapter))
    else:
        adapter_tables.name_summary(adapter)
