"""`adaplex adapters fsck` and `gc`: maintain a store, also while servers use it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from adaplex.server.errors import ConfigError

if TYPE_CHECKING:
    from adaplex.adapters.api import Catalog, ContentStore

StoreDir = Annotated[
    Path | None, typer.Option(help="Folder of the store; by default the store of `adaplex serve`.")
]
SharedStore = Annotated[str | None, typer.Option(help="s3://bucket/prefix of a shared store.")]
ConfigFile = Annotated[Path | None, typer.Option("--config", help="YAML file of settings.")]


def fsck(
    store_dir: StoreDir = None,
    shared_store: SharedStore = None,
    config: ConfigFile = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Read every stored adapter and list the problems. Exits with 1 if one is harmful."""
    with _opened(store_dir, shared_store, config) as (contents, catalog):
        from adaplex.adapters.api import check_store

        problems = list(check_store(catalog, contents))
        stored = len(catalog.digests())
    if as_json:
        typer.echo(json.dumps([asdict(problem) for problem in problems], indent=2))
    else:
        for problem in problems:
            typer.echo(f"{problem.kind}: {problem.adapter} {problem.digest}: {problem.reason}")
        typer.echo(f"{stored} contents checked, {len(problems)} problems")
    if any(not problem.harmless for problem in problems):
        raise typer.Exit(1)


def gc(
    store_dir: StoreDir = None, shared_store: SharedStore = None, config: ConfigFile = None
) -> None:
    """Remove stored content that no name points to and no server uses."""
    with _opened(store_dir, shared_store, config) as (contents, catalog):
        from adaplex.adapters.api import GarbageCollector

        collector = GarbageCollector(
            catalog, contents, is_leased=lambda _: False, on_removed=lambda _: None
        )
        removed = collector.sweep()
    typer.echo(f"removed {len(removed)} contents that nothing named")


@contextmanager
def _opened(
    store_dir: Path | None, shared_store: str | None, config: Path | None
) -> Iterator[tuple[ContentStore, Catalog]]:
    """Opens the store that flags, environment or YAML file select."""
    from adaplex.adapters.errors import AdaplexError
    from adaplex.server.load_config import load_config
    from adaplex.server.open_store import open_contents, require_store

    given = {"store_dir": store_dir, "shared_store": shared_store, "config": config}
    try:
        settings = load_config({name: value for name, value in given.items() if value is not None})
        require_store(settings)
        contents, catalog = open_contents(settings)
        try:
            yield contents, catalog
        finally:
            catalog.close()
            contents.close()
    except (ConfigError, AdaplexError) as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(2) from error
