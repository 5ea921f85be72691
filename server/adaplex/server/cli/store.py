"""`adaplex adapters fsck`, `gc` and `restore`: maintain a store, the first two also while servers
use it.
"""

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
    from adaplex.server.config import ServerConfig

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


def restore(store_dir: StoreDir = None, config: ConfigFile = None) -> None:
    """Make the catalog of a local store whole from the copies of its names. No server may run."""
    with _settings(store_dir, None, config) as settings:
        from adaplex.adapters import api

        root = settings.store_dir
        if settings.shared_store is not None:
            raise ConfigError(
                f"shared_store: the names of {settings.shared_store} are documents in the bucket; "
                "restore those from the bucket's own versions or backup"
            )
        if api.is_used(root):
            raise ConfigError(f"store_dir: a server uses the store in {root}; stop it first")
        found = api.restore(root)
    if found.moved is not None:
        typer.echo(f"moved the damaged catalog to {found.moved}")
    for name in found.names:
        typer.echo(f"restored {name}")
    typer.echo(f"{len(found.names)} names restored; adaplex adapters fsck checks their contents")


@contextmanager
def _opened(
    store_dir: Path | None, shared_store: str | None, config: Path | None
) -> Iterator[tuple[ContentStore, Catalog]]:
    """Opens the store that flags, environment or YAML file select."""
    with _settings(store_dir, shared_store, config) as settings:
        from adaplex.server.open_store import open_contents

        contents, catalog = open_contents(settings)
        try:
            yield contents, catalog
        finally:
            catalog.close()
            contents.close()


@contextmanager
def _settings(
    store_dir: Path | None, shared_store: str | None, config: Path | None
) -> Iterator[ServerConfig]:
    """Yields the settings of an existing store; prints errors of the block and exits with 2."""
    from adaplex.adapters.errors import AdaplexError
    from adaplex.server.load_config import load_config
    from adaplex.server.open_store import require_store

    given = {"store_dir": store_dir, "shared_store": shared_store, "config": config}
    try:
        settings = load_config({name: value for name, value in given.items() if value is not None})
        require_store(settings)
        yield settings
    except (ConfigError, AdaplexError, OSError) as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(2) from error
