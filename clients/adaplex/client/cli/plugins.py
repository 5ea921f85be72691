"""CommandGroup: a group with the commands of other packages, whose errors are one line.

A command is imported when it runs. Help of its group needs its name and its first line only.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable
from importlib.metadata import EntryPoint, entry_points
from typing import Any

import typer
from typer.core import TyperCommand, TyperGroup

GROUP = "adaplex.commands"
"""Entry point group: a command's name -> a typer command function, or a Typer app."""
OFFLINE = "adaplex.offline"
"""Entry point group: a command's name -> a function that does its work without a server."""


class LazyCommand(TyperCommand):
    """A command, or a group of commands, that is built when it runs."""

    # The types of click depend on typer's version: click's own, or typer's copy of it.
    def __init__(self, name: str, help: str | None, build: Callable[[], Any]) -> None:
        super().__init__(name, help=help)
        self._build = build

    def make_context(self, info_name: Any, args: Any, parent: Any = None, **extra: Any) -> Any:
        """Returns the context of the command that is built, which then runs in place of this."""
        return self._build().make_context(info_name, args, parent, **extra)


class CommandGroup(TyperGroup):
    """A group with plugins, each imported only for its own command or the group's help."""

    entry_points = GROUP
    """The entry point group of its plugins."""

    # The class of `ctx` depends on typer's version: click's own, or typer's copy of it.
    def list_commands(self, ctx: Any) -> list[str]:
        """Returns the names of the client's commands, then of the plugins, sorted."""
        own = super().list_commands(ctx)
        return own + sorted(name for name in self._plugins() if name not in own)

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        """Returns a command by its name; the client's own shadow plugins."""
        own = super().get_command(ctx, cmd_name)
        if own is not None:
            return own
        plugin = self._plugins().get(cmd_name)
        return None if plugin is None else _command(plugin)

    def _plugins(self) -> dict[str, EntryPoint]:
        return {point.name: point for point in entry_points(group=self.entry_points)}

    def invoke(self, ctx: Any) -> Any:
        """Runs a command. A failed call prints one line on standard error; the exit code is 1."""
        try:
            return super().invoke(ctx)
        except _client_errors() as error:
            from adaplex.client.cli.render import line

            reason = f" [{error.reason}]" if error.reason else ""
            typer.echo(line(f"error: {error}{reason}"), err=True)
            raise typer.Exit(1) from error


class AdapterCommands(CommandGroup):
    """The group `adaplex adapters`, with commands of the server package."""

    entry_points = "adaplex.adapters_commands"


def _client_errors() -> tuple[type[Any], ...]:
    """Returns the errors of calls; none if no command has imported the client, and with it grpc."""
    module = sys.modules.get("adaplex.client.errors")
    return () if module is None else (module.AdaplexClientError,)


def offline(name: str) -> Callable[..., Any]:
    """Returns the function that does a command's work without a server.

    Raises typer.Exit if the server package is not installed.
    """
    try:
        points = {point.name: point for point in entry_points(group=OFFLINE)}
        found: Callable[..., Any] = points[name].load()
    except (ImportError, KeyError) as error:
        typer.echo(f'error: {name} without a server: pip install "adaplex[server]"', err=True)
        raise typer.Exit(1) from error
    return found


def _command(point: EntryPoint) -> Any:
    """Returns the plugin's command, or one that says what to install if it cannot be imported."""
    try:
        loaded = point.load()
    except ImportError as error:
        return _stub(point.name, str(error))
    if isinstance(loaded, typer.Typer):
        return LazyCommand(point.name, loaded.info.help, lambda: as_command(point.name, loaded))
    return LazyCommand(
        point.name, inspect.getdoc(loaded), lambda: as_command(point.name, command_app(loaded))
    )


def command_app(function: Callable[..., Any]) -> typer.Typer:
    """Returns an app whose only command is a function."""
    app = typer.Typer(
        add_completion=False, pretty_exceptions_show_locals=False, rich_markup_mode=None
    )
    app.command()(function)
    return app


def _stub(name: str, cause: str) -> Any:
    app = typer.Typer(add_completion=False, rich_markup_mode=None)

    @app.command(
        help='Not installed: pip install "adaplex[server]"',
        context_settings={"allow_extra_args": True, "ignore_unknown_options": True},
    )
    def missing() -> None:
        hint = 'pip install "adaplex[server]"'
        typer.echo(f"error: {name} needs more packages ({cause}): {hint}", err=True)
        raise typer.Exit(1)

    return as_command(name, app)


def as_command(name: str, app: typer.Typer) -> Any:
    """Returns an app as one command of this name, by which the group's help finds it."""
    command = typer.main.get_command(app)
    command.name = name
    return command
