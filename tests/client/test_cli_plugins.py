from __future__ import annotations

import sys
from importlib.metadata import EntryPoint
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import typer

from adaplex.client.adapter_types import AdapterReport, ModuleReport, Validation
from adaplex.client.cli import plugins


@pytest.fixture
def plugin(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """A module with commands registered as entry points; `serve` cannot be imported."""
    module = ModuleType("adaplex_test_plugin")
    group = typer.Typer()

    def greet(name: str, loud: bool = False) -> None:
        """Say hello."""
        typer.echo(f"hello {name}{'!' if loud else ''}")

    @group.command()
    def one() -> None:
        typer.echo("one")

    @group.command()
    def two() -> None:
        typer.echo("two")

    vars(module).update(greet=greet, group=group)
    monkeypatch.setitem(sys.modules, module.__name__, module)
    points = [
        EntryPoint("greet", f"{module.__name__}:greet", plugins.GROUP),
        EntryPoint("count", f"{module.__name__}:group", plugins.GROUP),
        EntryPoint("serve", "adaplex_no_such_module:serve", plugins.GROUP),
        EntryPoint("status", "adaplex_no_such_module:status", plugins.GROUP),
    ]
    within = [EntryPoint("fsck", f"{module.__name__}:greet", plugins.AdapterCommands.entry_points)]
    found = {plugins.GROUP: points, "adaplex.adapters_commands": within}
    monkeypatch.setattr(plugins, "entry_points", lambda group: found[group])
    return module


@pytest.mark.usefixtures("plugin")
def test_commands_of_other_packages(run: Any) -> None:
    assert run("greet", "you", "--loud").stdout == "hello you!\n"
    assert run("count", "two").stdout == "two\n"
    assert run("status").exit_code == 0  # Ours come first.
    assert run("nothing").exit_code == 2


@pytest.mark.usefixtures("plugin")
def test_commands_of_other_packages_for_adapters(run: Any) -> None:
    assert run("adapters", "fsck", "store").stdout == "hello store\n"
    assert "fsck" in run("adapters", "--help").stdout
    assert run("fsck", "store").exit_code == 2
    assert run("adapters", "greet", "you").exit_code == 2


def test_verify_without_a_server_uses_the_installed_package(
    run: Any, adapter_directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    class Point:
        name = "verify"

        def load(self) -> Any:
            def verify(directory: Path, model: str, quantization: str | None) -> Validation:
                asked.append((directory, model, quantization))
                module = ModuleReport("q", 4, 2.0, 8, 8, True, ("low-rank", "bias"))
                report = AdapterReport("lora", "sha256:1", (module,), 256, (), ())
                return Validation(True, report)

            return verify

    monkeypatch.setattr(plugins, "entry_points", lambda group: [Point()])
    result = run("adapters", "verify", adapter_directory, "--model", "m", "--quantization", "bf16")
    assert result.exit_code == 0
    assert asked == [(adapter_directory, "m", "bf16")]
    lines = [" ".join(line.split()) for line in result.stdout.splitlines()]
    assert "served as low-rank at 1, bias at 1" in lines
    assert "greatest rank 4" in lines

    monkeypatch.setattr(plugins, "entry_points", lambda group: [])
    result = run("adapters", "verify", adapter_directory, "--model", "m")
    assert result.exit_code == 1
    assert 'pip install "adaplex[server]"' in result.stderr
    assert run("adapters", "verify", adapter_directory, "--quantization", "nf4").exit_code == 2


@pytest.mark.usefixtures("plugin")
def test_a_command_that_is_not_installed_says_how_to_install_it(run: Any) -> None:
    result = run("serve", "--model", "x")
    assert result.exit_code == 1
    assert result.stderr.startswith("error: serve needs more packages (No module named")
    assert result.stderr.endswith('pip install "adaplex[server]"\n')


@pytest.mark.usefixtures("plugin")
def test_help_lists_all_commands(run: Any) -> None:
    shown = run("--help").stdout
    for command in ("generate", "adapters", "status", "greet", "count", "serve"):
        assert command in shown
    assert "Say hello." in shown


def test_commands_of_other_packages_are_not_imported_for_ours(
    run: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(point: EntryPoint) -> Any:
        raise AssertionError(f"{point.name} was imported")

    points = [EntryPoint("serve", "adaplex_no_such_module:serve", plugins.GROUP)]
    monkeypatch.setattr(plugins, "entry_points", lambda group: points)
    monkeypatch.setattr(plugins, "_command", fail)
    assert run("generate", "hello").exit_code == 0
