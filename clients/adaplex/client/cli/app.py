"""The root of the command line: the options of the connection."""

from __future__ import annotations

from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from adaplex.client._defaults import DEFAULT_TARGET, DEFAULT_TIMEOUT
from adaplex.client.cli.commands import RootCommands

if TYPE_CHECKING:
    from adaplex.client.aio import AsyncClient
    from adaplex.client.client import Client

app = typer.Typer(
    cls=RootCommands,
    no_args_is_help=True,
    pretty_exceptions_show_locals=False,
    rich_markup_mode=None,  # plain help is shown in half the time, and cuts no flag
    help="Multi-adapter inference: one base model, an adapter per request.",
)


@dataclass(frozen=True)
class Target:
    """The options of the connection; the context object of every command."""

    target: str
    token: str | None
    tls: bool | Path
    timeout: float
    actor: str | None
    client_cert: Path | None
    client_key: Path | None

    def client(self) -> Client:
        """Returns a new client, to be used in `with`."""
        from adaplex.client.client import Client  # imports grpc, which --help does not need

        return Client(**vars(self))

    def async_client(self) -> AsyncClient:
        """Returns a new client for asyncio, to be used in `async with`."""
        from adaplex.client.aio import AsyncClient

        return AsyncClient(**vars(self))


def connect(context: typer.Context) -> Client:
    """Returns a client of the server that the command line names."""
    target = context.find_object(Target)
    assert target is not None
    return target.client()


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"adaplex {version('adaplex')}")
        raise typer.Exit


def _pem(variable: str, help: str) -> Any:
    """Returns the option of a file that exists, which a variable may name."""
    return typer.Option(envvar=variable, exists=True, dir_okay=False, help=help)


@app.callback()
def root(
    context: typer.Context,
    target: Annotated[
        str, typer.Option(envvar="ADAPLEX_TARGET", help="Host and port of the server.")
    ] = DEFAULT_TARGET,
    token: Annotated[str | None, typer.Option(envvar="ADAPLEX_TOKEN", help="Bearer token.")] = None,
    tls: Annotated[
        bool, typer.Option("--tls", help="Use TLS, trusting the system's roots.")
    ] = False,
    tls_roots: Annotated[
        Path | None,
        _pem("ADAPLEX_TLS_ROOTS", "Use TLS, trusting the roots of this PEM file."),
    ] = None,
    client_cert: Annotated[
        Path | None,
        _pem(
            "ADAPLEX_CLIENT_CERT",
            "PEM certificate that shows the server who calls; needs --client-key and TLS.",
        ),
    ] = None,
    client_key: Annotated[
        Path | None, _pem("ADAPLEX_CLIENT_KEY", "PEM key of --client-cert.")
    ] = None,
    timeout: Annotated[
        float, typer.Option(min=0.001, help="Seconds of a call, at most.")
    ] = DEFAULT_TIMEOUT,
    actor: Annotated[
        str | None,
        typer.Option(
            envvar="ADAPLEX_ACTOR",
            help="Your name, recorded in adapter history (unauthenticated); not sent by default.",
        ),
    ] = None,
    show_version: Annotated[
        bool,
        typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version."),
    ] = False,
) -> None:
    """Multi-adapter inference: one base model, an adapter per request."""
    context.obj = Target(target, token, tls_roots or tls, timeout, actor, client_cert, client_key)
