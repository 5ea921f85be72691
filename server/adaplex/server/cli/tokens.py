"""`adaplex tokens`: makes, lists, expires and revokes the credentials of a server's callers."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from adaplex.client.cli.arguments import AsJson
from adaplex.server.cli.store import ConfigFile
from adaplex.server.errors import ConfigError

if TYPE_CHECKING:
    from adaplex.server.access.token_file import Entry, TokenFile

app = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode=None,
    add_completion=False,
    pretty_exceptions_show_locals=False,
    help="Make, list, expire and revoke the tokens of a server's callers.",
)

UNITS = {"s": "seconds", "m": "minutes", "h": "hours", "d": "days"}
SCOPES = "generate|adapters:read|adapters:write|admin"
File = Annotated[
    Path | None,
    typer.Option(
        "--tokens-file", envvar="ADAPLEX_TOKENS_FILE", help="File of the tokens, as for `serve`."
    ),
]
Which = Annotated[str, typer.Argument(help="Id of a token, or the name of its principal.")]


def _duration(text: str) -> timedelta:
    """Parses such as 90m, 12h or 30d."""
    found = re.fullmatch(r"([0-9]{1,9})([smhd])", text)
    if found is None:
        raise typer.BadParameter(f"{text!r} is no duration such as 90m, 12h or 30d")
    return timedelta(**{UNITS[found[2]]: int(found[1])})


@app.command()
def create(
    name: Annotated[str, typer.Argument(help="Principal, recorded as the actor in histories.")],
    scope: Annotated[
        list[str], typer.Option(metavar=SCOPES, help="Right of the principal; repeatable.")
    ],
    tenant: Annotated[str, typer.Option(help="Tenant that the principal acts for.")] = "default",
    expires: Annotated[
        timedelta | None,
        typer.Option(parser=_duration, metavar="30d", help="Time that it stays valid."),
    ] = None,
    certificate: Annotated[
        bool,
        typer.Option(
            "--certificate",
            help="Make no token: the principal is known by a client certificate whose common name "
            "is NAME.",
        ),
    ] = False,
    tokens_file: File = None,
    config: ConfigFile = None,
) -> None:
    """Make a token and print it. It is kept nowhere: the file holds a salted hash."""
    from adaplex.server.access.principal import Scope

    unknown = sorted({*scope} - {each.value for each in Scope})
    if unknown:
        raise typer.BadParameter(f"scope: {unknown[0]!r} is not one of {SCOPES}")
    with _opened(tokens_file, config) as file:
        entry, token = file.create(
            name,
            tenant=tenant,
            scopes=frozenset(map(Scope, scope)),
            expires=None if expires is None else datetime.now(UTC) + expires,
            certificate=certificate,
        )
    typer.echo(f"{file.path}: {entry.name} may {', '.join(sorted(entry.scopes))}", err=True)
    typer.echo(entry.name if token is None else str(token))


@app.command("list")
def list_tokens(
    tokens_file: File = None, config: ConfigFile = None, as_json: AsJson = False
) -> None:
    """List the principals, without secrets."""
    from adaplex.client.cli import render

    with _opened(tokens_file, config) as file:
        entries = file.read()
    now = datetime.now(UTC)
    if as_json:
        secret = {"salt", "hash"}
        documents = [
            e.model_dump(mode="json", exclude=secret) | {"state": e.state(now)} for e in entries
        ]
        typer.echo(json.dumps(documents, indent=2))
        return
    render.table(
        ("ID", "NAME", "TENANT", "SCOPES", "BY", "EXPIRES (UTC)", "STATE"),
        [_row(entry, now) for entry in entries],
    )


@app.command()
def revoke(which: Which, tokens_file: File = None, config: ConfigFile = None) -> None:
    """End a token at once. Running servers follow with the next call."""
    with _opened(tokens_file, config) as file:
        changed = file.change(which, revoked=datetime.now(UTC))
    typer.echo(f"revoked {', '.join(entry.id for entry in changed)}")


@app.command()
def expire(
    which: Which,
    after: Annotated[
        timedelta, typer.Option("--in", parser=_duration, metavar="7d", help="Time from now.")
    ],
    tokens_file: File = None,
    config: ConfigFile = None,
) -> None:
    """Set when a token ends."""
    with _opened(tokens_file, config) as file:
        changed = file.change(which, expires=datetime.now(UTC) + after)
    for entry in changed:
        typer.echo(f"{entry.id} of {entry.name} expires {_time(entry.expires)} UTC")


def _row(entry: Entry, now: datetime) -> tuple[str, ...]:
    return (
        entry.id,
        entry.name,
        entry.tenant,
        ",".join(sorted(entry.scopes)),
        "certificate" if entry.is_certificate else "token",
        _time(entry.expires),
        entry.state(now),
    )


def _time(time: datetime | None) -> str:
    return "never" if time is None else time.astimezone(UTC).strftime("%Y-%m-%d %H:%M")


@contextmanager
def _opened(tokens_file: Path | None, config: Path | None) -> Iterator[TokenFile]:
    """Yields the file that flags, environment or YAML file select."""
    from adaplex.server.access.token_file import TokenFile
    from adaplex.server.load_config import load_config

    given = {"tokens_file": tokens_file, "config": config}
    try:
        settings = load_config({name: value for name, value in given.items() if value is not None})
        if settings.tokens_file is None:
            raise ConfigError("tokens_file: names no file; set --tokens-file or its variable")
        yield TokenFile(settings.tokens_file)
    except ConfigError as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(2) from error
