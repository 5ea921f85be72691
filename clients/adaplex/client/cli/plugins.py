"""CommandGroup: adds the commands of other packages, and turns errors into one line."""

from __future__ import annotations

from collections.abc import Callable
from importlib.metadata import EntryPoint, entry_points
from typing import Any

import typer
from typer.core import TyperGroup

from adaplex.client.cli.render import line
from adaplex.client.errors import AdaplexClientError

GROUP = "adaplex.commands"
"""Entry points of this group: a command's name -> a typer command function, or a Typer app."""


OFFLINE = "adaplex.offline"
"""Entry points of this group do without a server what a command of ours asks it for."""


class CommandGroup(TyperGroup):
    """A group with plugins. One is imported only when its command, or the help, is asked for."""

    entry_points = GROUP
    """Where its plugins are registered."""

    # The context's class depends on typer's version: click's own, or typer's copy of it.
    def list_commands(self, ctx: Any) -> list[str]:
        """Names of our commands, then of those from entry points."""
        own = super().list_commands(ctx)
        return own + sorted(name for name in self._plugins() if name not in own)

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        """A command by its name; ours come first."""
        own = super().get_command(ctx, cmd_name)
        if own is not None:
            return own
        plugin = self._plugins().get(cmd_name)
        return None if plugin is None else _command(plugin)

    def _plugins(self) -> dict[str, EntryPoint]:
        return {point.name: point for point in entry_points(group=self.entry_points)}

    def invoke(self, ctx: Any) -> Any:
        """Runs a command; a failed call is one line on stderr and exit code 1."""
        try:
            return super().invoke(ctx)
        except AdaplexClientError as error:
            reason = f" [{error.reason}]" if error.reason else ""
            typer.echo(line(f"error: {error}{reason}"), err=True)
            raise typer.Exit(1) from error


class AdapterCommands(CommandGroup):
    """`adaplex adapters`, with what the server package adds to it."""

    entry_points = "adaplex.adapters_commands"


def offline(name: str) -> Callable[..., Any]:
    """What does a command's work here. Raises Exit where it is not installed."""
    try:
        points = {point.name: point for point in entry_points(group=OFFLINE)}
        found: Callable[..., Any] = points[name].load()
    except (ImportError, KeyError) as error:
        typer.echo(f'error: {name} without a server: pip install "adaplex[server]"', err=True)
        raise typer.Exit(1) from error
    return found


def _command(point: EntryPoint) -> Any:
    """The plugin's command, or one that says what to install when it cannot be imported."""
    try:
        loaded = point.load()
    except ImportError as error:
        return _stub(point.name, str(error))
    if not isinstance(loaded, typer.Typer):
        function, loaded = (
            loaded,
            typer.Typer(add_completion=False, pretty_exceptions_show_locals=False),
        )
        loaded.command()(function)
    return _named(point.name, loaded)


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

    return _named(name, app)


def _named(name: str, app: typer.Typer) -> Any:
    """An app as one command; a name other than its own would leave it out of the help."""
    command = typer.main.get_command(app)
    command.name = name
    return command
