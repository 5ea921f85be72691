"""The `adaplex` command: the client's commands, and those that other packages register."""

from adaplex.client.cli import adapters, bench, generate, status
from adaplex.client.cli.app import app

__all__ = ["app", "main"]

app.command("generate")(generate.generate)
app.command("status")(status.status)
app.add_typer(adapters.app, name="adapters")
app.add_typer(bench.app, name="bench")


def main() -> None:
    """Runs the command line."""
    app(prog_name="adaplex")
