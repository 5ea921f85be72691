"""`adaplex cache`: lists and empties the folder of models, quantized weights and built kernels."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from adaplex.client.cli.arguments import AsJson
from adaplex.server.cli.store import ConfigFile
from adaplex.server.errors import ConfigError

if TYPE_CHECKING:
    from adaplex.model.base.cache_folder import CacheEntry, CacheFolder

app = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode=None,
    add_completion=False,
    pretty_exceptions_show_locals=False,
    help="List and empty the cache of models, quantized weights and built kernels.",
)

Cache = Annotated[
    Path | None, typer.Option("--cache", help="Folder of the cache; by default that of `serve`.")
]


@app.command("list")
def list_cache(cache: Cache = None, config: ConfigFile = None, as_json: AsJson = False) -> None:
    """List what is in the cache, the least recently used first."""
    from adaplex.client.cli import render

    with _opened(cache, config) as (folder, limit):
        entries = folder.entries()
    if as_json:
        document = [asdict(entry) | {"path": str(entry.path)} for entry in entries]
        typer.echo(json.dumps(document, indent=2))
        return
    render.table(
        ("KIND", "NAME", "SIZE", "LAST USED (UTC)", "IN USE"),
        [
            (e.kind, e.path.name, render.size(e.size), _time(e.used), "yes" if e.in_use else "")
            for e in entries
        ],
    )
    made = sum(entry.size for entry in entries if entry.kind != "models")
    models = sum(entry.size for entry in entries) - made
    typer.echo(
        f"{folder.root}: {render.size(made)} of {render.size(limit)} (max_cache_bytes) for "
        f"quantized weights and kernels; {render.size(models)} of models"
    )


@app.command()
def clear(
    kind: Annotated[
        list[str] | None,
        typer.Option(
            metavar="quantized|kernels|models",
            help="Only of this kind; repeatable. By default quantized and kernels.",
        ),
    ] = None,
    cache: Cache = None,
    config: ConfigFile = None,
) -> None:
    """Remove quantized weights and kernels, which the next start makes again. Files that a running
    server uses stay. Models are removed only by --kind models.
    """
    from adaplex.client.cli import render
    from adaplex.model.base.cache_folder import KINDS, MADE

    unknown = sorted({*(kind or ())} - {*KINDS})
    if unknown:
        raise typer.BadParameter(f"{unknown[0]!r} is not one of {', '.join(KINDS)}")
    kinds = [each for each in KINDS if each in (kind or MADE)]
    with _opened(cache, config) as (folder, _):
        removed, left = folder.clear(kinds)
    for entry in left:
        reason = "in use" if entry.in_use else "cannot be removed by this user"
        typer.echo(f"left: {entry.path}: {reason}", err=True)
    typer.echo(f"removed {len(removed)} of {folder.root}: {render.size(_bytes(removed))}")


@contextmanager
def _opened(cache: Path | None, config: Path | None) -> Iterator[tuple[CacheFolder, int]]:
    """Yields the cache that flags, environment or YAML file select, and its limit in bytes."""
    from adaplex.model.base.cache_folder import CacheFolder
    from adaplex.model.base.source import default_cache
    from adaplex.server.load_config import load_config

    given = {"cache": cache, "config": config}
    try:
        settings = load_config({name: value for name, value in given.items() if value is not None})
        yield CacheFolder(settings.cache or default_cache()), settings.max_cache_bytes
    except (ConfigError, OSError) as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(2) from error


def _bytes(entries: list[CacheEntry]) -> int:
    return sum(entry.size for entry in entries)


def _time(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%d %H:%M")
