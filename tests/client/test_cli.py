from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

import grpc
from google.rpc.error_details_pb2 import BadRequest, ErrorInfo
from typer.testing import CliRunner

from adaplex.client.cli import app
from client.fake_server import FakeServer
from time_limits import WAIT_SECONDS

# status


def test_status(run: Any) -> None:
    result = run("status")
    assert result.exit_code == 0
    rows = dict(line.split(maxsplit=1) for line in result.stdout.splitlines())
    assert rows["model"].strip() == "tiny (LlamaForCausalLM)"
    assert rows["weights"].strip() == "int4-group, groups of 32, 5.0 MiB"
    assert rows["running"].strip() == "2 of 16"
    assert rows["store"].strip() == "1.0 MiB of 4.0 MiB"
    assert rows["host"].strip() == "2.0 MiB of 8.0 MiB"


def test_status_as_json(run: Any) -> None:
    info = json.loads(run("status", "--json").stdout)
    assert info["model"]["quantization"] == "int4-group"
    assert info["model"]["group_size"] == 32
    assert info["capacity"]["requests_running"] == 2


# errors


def test_an_error_is_one_line_with_field_and_reason(run: Any, server: FakeServer) -> None:
    fields = [BadRequest.FieldViolation(field="adapter", description='no adapter "x"\nhere')]
    server.fail(
        grpc.StatusCode.NOT_FOUND,
        "no such adapter",
        ErrorInfo(reason="ADAPTER_NOT_FOUND"),
        BadRequest(field_violations=fields),
    )
    for command in (["generate", "hello"], ["adapters", "show", "x"], ["status"]):
        result = run(*command)
        assert result.exit_code == 1
        assert result.stdout == ""
        assert result.stderr == 'error: adapter: no adapter "x" here [ADAPTER_NOT_FOUND]\n'


def test_an_unreachable_server_is_one_line() -> None:
    result = CliRunner().invoke(
        app, ["--target", "127.0.0.1:1", "--timeout", str(WAIT_SECONDS), "status"]
    )
    assert result.exit_code == 1
    assert result.stderr.startswith("error: ")
    assert result.stderr.count("\n") == 1


def test_an_unknown_option_is_a_usage_error(run: Any) -> None:
    assert run("generate", "hello", "--warmth", 3).exit_code == 2
    assert run("generate", "hello", "--mode", "sideways").exit_code == 2


def test_token_and_target_come_from_the_environment(server: FakeServer) -> None:
    environment = {"ADAPLEX_TARGET": server.target, "ADAPLEX_TOKEN": "s3cret"}
    assert CliRunner().invoke(app, ["status"], env=environment).exit_code == 0
    assert server.metadata[0]["authorization"] == "Bearer s3cret"


def test_main_runs_as_a_program(server: FakeServer) -> None:
    program = "from adaplex.client.cli import main; main()"
    command = [sys.executable, "-c", program, "--target", server.target, "generate", "hello"]
    ran = subprocess.run(command, capture_output=True, text=True, check=True)
    assert ran.stdout == "The answer is 42.\n"
