"""CommandGroup: a group with the commands of other packages, whose errors are one line."""

from __future__ import annotations

from collections.abc import Callable
from importlib.metadata import EntryPoint, entry_points
from typing import Any

import typer
from typer.core import TyperGroup

from adaplex.client.cli.render import line
from adaplex.client.errors import AdaplexClientError

GROUP = "adaplex.commands"
"""Entry point group: a command's name -> a typer command function, or a Typer app."""
OFFLINE = "adaplex.offline"
"""Entry point group: a command's name -> a function that does its work without a server."""


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
        except AdaplexClientError as error:
            reason = f" [{error.reason}]" if error.reason else ""
            typer.echo(line(f"error: {error}{reason}"), err=True)
            raise typer.Exit(1) from error


class AdapterCommands(CommandGroup):
    """The group `adaplex adapters`, with commands of the server package."""

    entry_points = "adaplex.adapters_commands"


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
    if not isinstance(loaded, typer.Typer):
        function = loaded
        loaded = typer.Typer(add_completion=False, pretty_exceptions_show_locals=False)
        loaded.command()(function)
    return _as_command(point.name, loaded)


def _stub(name: str, cause: str) -> Any:
    app = typer.Typer(add_completion=False)

    @app.command(
        help='Not installed: pip install "adaplex[server]"',
        context_settings={"allow_extra_args": True, "ignore_unknown_options": True},
    )
    def missing() -> None:
        hint = 'pip install "adaplex[server]"'
        typer.echo(f"error: {name} needs more packages ({cause}): {hint}", err=True)
        raise typer.Exit(1)

    return _as_command(name, app)


def _as_command(name: str, app: typer.Typer) -> Any:
    """Returns an app as one command of this name, by which the group's help finds it."""
    command = typer.main.get_command(app)
    command.name = name
    return command
