"""The `adaplex` command: the client's commands, and those that other packages register."""

from adaplex.client.cli.app import app

__all__ = ["app", "main"]


def main() -> None:
    """Runs the command line."""
    app(prog_name="adaplex")
