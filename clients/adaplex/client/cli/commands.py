"""RootCommands: the group `adaplex`, with the client's commands and those of other packages."""

from __future__ import annotations

from functools import partial
from importlib import import_module
from typing import Any

import typer

from adaplex.client.cli.plugins import CommandGroup, LazyCommand, as_command, command_app

COMMANDS = {
    "generate": "Generate text and stream it to the terminal; the applied adapter goes to "
    "standard error.",
    "status": "Show the server's base model, capacity and load.",
    "adapters": "List, upload, check, name and delete adapters.",
    "bench": "Send load to a running server and measure it. Prompts are random tokens, none "
    "repeated; answers are greedy and of full length.",
}
"""Client command -> its help. The command is `app`, or the function of the same name, in the module
of the same name, which imports the client; help of the group does not need it."""


class RootCommands(CommandGroup):
    """The group `adaplex`."""

    def __init__(self, **attributes: Any) -> None:
        super().__init__(**attributes)
        for name, text in COMMANDS.items():
            self.add_command(LazyCommand(name, text, partial(build, name)))


def build(name: str) -> Any:
    """Imports a command of the client and returns it."""
    module = import_module(f"adaplex.client.cli.{name}")
    app: typer.Typer | None = getattr(module, "app", None)
    return as_command(name, app or command_app(getattr(module, name)))
