from __future__ import annotations

import subprocess
import sys

import pytest
import typer
import yaml
from typer.testing import CliRunner

from adaplex.server.cli.serve import serve
from adaplex.server.config import ServerConfig


@pytest.fixture
def command() -> typer.Typer:
    app = typer.Typer()
    app.command()(serve)
    return app


@pytest.mark.parametrize("flag", ["--help", "--print-config"])
def test_flags_and_settings_are_shown_without_torch_and_grpc(flag: str) -> None:
    heavy = ["torch", "transformers", "numpy", "grpc", "adaplex.model", "adaplex.server.build"]
    program = (
        "import sys, typer; from adaplex.client.cli.plugins import command_app;"
        "from adaplex.server.cli.serve import serve\n"
        f"try: command_app(serve)([{flag!r}])\n"
        f"finally: print([m for m in {heavy!r} if m in sys.modules], file=sys.stderr)"
    )
    ran = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert (ran.returncode, ran.stderr) == (0, "[]\n")
    assert "kv" in ran.stdout


def test_help_shows_every_flag_with_its_meaning(command: typer.Typer) -> None:
    shown = " ".join(CliRunner().invoke(command, ["--help"], env={"COLUMNS": "200"}).output.split())
    for name, field in ServerConfig.model_fields.items():
        assert f"--{name.replace('_', '-')} " in shown
        assert field.description
    assert "nf4|int8|int4-group|bf16|fp32" in shown
    assert "256MiB" in shown


def test_print_config_prints_and_serves_nothing(command: typer.Typer) -> None:
    flags = ["--port", "5", "--no-prefix-cache", "--adapters", "a=/x", "--print-config"]
    result = CliRunner().invoke(command, flags)
    assert result.exit_code == 0
    settings = yaml.safe_load(result.output)
    assert settings["port"] == 5
    assert settings["prefix_cache"] is False
    assert settings["adapters"] == {"a": "/x"}


def test_a_bad_flag_is_one_line_and_an_exit_code(command: typer.Typer) -> None:
    result = CliRunner().invoke(command, ["--port", "-1"])
    assert result.exit_code == 2
    assert result.stderr == "adaplex serve: port: Input should be greater than or equal to 0\n"
