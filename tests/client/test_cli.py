from __future__ import annotations

import json
import subprocess
import sys
from importlib.metadata import EntryPoint
from pathlib import Path
from types import ModuleType
from typing import Any

import grpc
import pytest
import typer
from google.rpc.error_details_pb2 import BadRequest, ErrorInfo
from typer.testing import CliRunner

from adaplex.client.adapter_types import AdapterReport, ModuleReport, Validation
from adaplex.client.cli import app, plugins, render
from adaplex.v1 import generation_pb2
from client.fake_server import DIGEST, FakeServer, event, finished, started

# generate


def test_generate_prints_the_answer_and_its_proof(run: Any) -> None:
    result = run("generate", "hello", "--adapter", "tone@2", "--mode", "merged")
    assert result.exit_code == 0
    assert result.stdout == "The answer is 42.\n"
    assert result.stderr == (
        "tone@2 sha256:abababababab merged 14 modules | 7 (4 cached) + 5 tokens"
        " | 2.5 tok/s | stop\n"
    )


def test_generate_from_the_base_says_so(run: Any) -> None:
    assert run("generate", "hello").stderr.startswith("base model tiny | ")


@pytest.mark.parametrize(
    ("alias", "shown"), [("default", " (via default)"), ("latest", ""), ("", "")]
)
def test_generate_names_the_alias_and_prints_warnings(
    run: Any, server: FakeServer, alias: str, shown: str
) -> None:
    spec = generation_pb2.GenerationSpec(adapter="voice@1")
    begin = started(spec, "r")
    begin.adapter.alias = alias
    begin.adapter.warnings.append("another base\x1b[2J\nerror: forged")
    server.events = [event(started=begin), event(finished=finished())]
    lines = run("generate", "hello", "-a", "voice").stderr.splitlines()
    assert lines[0].startswith(f"voice@1{shown} sha256:abababababab ")
    assert lines[1:] == ["warning: another base[2J error: forged"]


def test_generate_chats_unless_told_otherwise(run: Any, server: FakeServer) -> None:
    run("generate", "hello")
    run("generate", "--raw", "hello")
    chat, raw = (request.spec for request in server.requests)
    assert [(m.role, m.content) for m in chat.chat.messages] == [("user", "hello")]
    assert raw.text == "hello"


def test_generate_reads_standard_input(run: Any, server: FakeServer) -> None:
    assert run("generate", "--raw", text="two\nlines\n").exit_code == 0
    assert server.requests[0].spec.text == "two\nlines"


def test_generate_without_a_prompt_is_a_usage_error(run: Any, server: FakeServer) -> None:
    result = run("generate", text="")
    assert result.exit_code == 2
    assert "prompt" in result.stderr
    assert server.requests == []


def test_generate_passes_every_option(run: Any, server: FakeServer) -> None:
    options = "--max-tokens 9 --temperature 0.5 --top-k 4 --top-p 0.5 --min-p 0.25 --seed 0"
    run("generate", "hello", *options.split(), "--stop", "a", "--stop", "b", "--logprobs", 1)
    sampling = server.requests[0].spec.sampling
    expected = generation_pb2.SamplingParams(
        max_tokens=9,
        temperature=0.5,
        top_k=4,
        top_p=0.5,
        min_p=0.25,
        seed=0,
        stop=["a", "b"],
        logprobs=1,
    )
    assert sampling == expected


def test_generate_shows_log_probabilities(run: Any) -> None:
    result = run("generate", "hello", "--logprobs", 1)
    assert "LOGPROB" in result.stdout
    assert "-0.2500" in result.stdout


def test_generate_as_json_is_the_whole_result(run: Any) -> None:
    result = run("generate", "hello", "--adapter", "tone", "--json")
    answer = json.loads(result.stdout)
    assert answer["text"] == "The answer is 42."
    assert answer["adapter"] == {
        "name": "tone",
        "version": 3,
        "digest": DIGEST,
        "mode": "unmerged",
        "modules": 14,
        "alias": "",
        "components": [],
        "warnings": [],
    }
    assert answer["finish_reason"] == "stop"
    assert answer["usage"]["cached_tokens"] == 4


def test_generate_that_breaks_off_closes_the_line(run: Any, server: FakeServer) -> None:
    spec = generation_pb2.GenerationSpec()
    delta = generation_pb2.GenerationDelta(text="half an ans")
    server.events = [event(started=started(spec, "r")), event(delta=delta)]
    result = run("generate", "hello")
    assert result.exit_code == 1
    assert result.stdout == "half an ans\n"
    assert result.stderr == "error: the stream ended without its last event\n"


def test_text_with_control_characters_is_shown_without_them_on_a_terminal(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    render.text("a\x1b[31mb\n\tc\x9b")
    assert capsys.readouterr().out == "a[31mb\n\tc"


# adapters


def test_ls(run: Any) -> None:
    result = run("adapters", "ls")
    head, *lines = result.stdout.splitlines()
    expected = "NAME VERSION DIGEST FAMILY MODULES RANK STORED MEMORY PINNED LABELS"
    assert " ".join(head.split()) == expected
    assert lines[0].split() == [
        "adapter-0", "1", "sha256:abababababab", "lora", "2", "8", "3.0", "MiB", "arena",
        "team=blue",
    ]  # fmt: skip
    assert len(lines) == 5


def test_ls_as_json(run: Any, server: FakeServer) -> None:
    listed = json.loads(run("adapters", "ls", "--json").stdout)
    assert [entry["name"] for entry in listed] == server.names
    assert listed[0]["digest"] == DIGEST
    assert listed[0]["create_time"] == "2023-11-14T22:13:20.500000+00:00"


def test_push(run: Any, server: FakeServer, adapter_directory: Path) -> None:
    result = run("adapters", "push", "tone", adapter_directory, "--replace")
    assert result.exit_code == 0, result.output
    assert result.stdout == "tone@1 sha256:abababababab lora 2 modules (stored)\n"
    assert server.uploads[0].metadata.name == "tone"
    result = run("adapters", "push", "tone", adapter_directory, "--json")
    assert json.loads(result.stdout)["created"] is True


def test_push_of_a_directory_without_weights(run: Any, adapter_directory: Path) -> None:
    (adapter_directory / "adapter_model.safetensors").unlink()
    result = run("adapters", "push", "tone", adapter_directory)
    assert result.exit_code == 1
    assert result.stderr.strip().startswith("error: adapter_model.safetensors: missing in ")


def test_push_of_no_directory_is_a_usage_error(run: Any, tmp_path: Path) -> None:
    assert run("adapters", "push", "tone", tmp_path / "nothing").exit_code == 2


def test_load(run: Any) -> None:
    result = run("adapters", "load", "tone", "/srv/tone")
    assert result.stdout == "tone@1 sha256:abababababab lora 2 modules (was there already)\n"


def test_show(run: Any) -> None:
    result = run("adapters", "show", "tone")
    assert "tone@1" in result.stdout
    assert DIGEST in result.stdout
    assert "model.layers.1.self_attn.q_proj" in result.stdout
    shown = json.loads(run("adapters", "show", "tone", "--json").stdout)
    assert shown["adapter"]["name"] == "tone"
    assert shown["report"]["modules"][0]["rank"] == 8


def test_show_has_the_facts_of_this_version_and_a_table_of_all(run: Any) -> None:
    lines = run("adapters", "show", "tone@1").stdout.splitlines()
    rows = [" ".join(line.split()) for line in lines]
    assert not any(row.startswith("newest version") for row in rows)
    assert f"base fingerprint {DIGEST}" in rows
    assert "changed 2023-11-14T22:13:21+00:00" in rows
    start = rows.index("VERSION DIGEST CREATED STORED SOURCE BY")
    created = "2023-11-14T22:13:20+00:00 3.0 MiB upload ada"
    assert rows[start + 1 : start + 3] == [
        f"4 sha256:abababababab {created}",
        f"3 sha256:abababababab {created}",
    ]


def test_verify_of_a_good_adapter(run: Any, adapter_directory: Path) -> None:
    result = run("adapters", "verify", adapter_directory)
    assert result.exit_code == 0
    assert "note: task_type has no effect" in result.stdout
    assert "merged only, in 3.0 MiB" in result.stdout
    assert result.stdout.endswith("\nvalid\n")


def test_verify_prints_every_refusal_as_it_is(
    run: Any, server: FakeServer, adapter_directory: Path
) -> None:
    server.refusals = [("rank_pattern[q_proj]", "must be positive"), ("lora_A", "[bold]NaN[/]")]
    result = run("adapters", "verify", adapter_directory)
    assert result.exit_code == 1
    assert "refused: rank_pattern[q_proj]: must be positive\n" in result.stdout
    assert "refused: lora_A: [bold]NaN[/]\n" in result.stdout
    as_json = run("adapters", "verify", adapter_directory, "--json")
    assert as_json.exit_code == 1
    assert json.loads(as_json.stdout)["report"]["refusals"][1]["where"] == "lora_A"


def test_unload_and_rm(run: Any) -> None:
    assert run("adapters", "unload", "adapter-1").stdout == "unloaded adapter-1\n"
    assert run("adapters", "unload", "nobody").stdout == "nobody was not in memory\n"
    assert run("adapters", "rm", "tone").stdout == "deleted tone, 2 versions\n"


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


def test_a_server_that_is_not_there_is_one_line() -> None:
    result = CliRunner().invoke(app, ["--target", "127.0.0.1:1", "--timeout", "5", "status"])
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


# commands of other packages


@pytest.fixture
def plugin(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """A module with commands, found as entry points; `broken` cannot be imported."""
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


def test_verify_without_a_server_is_done_by_what_is_installed(
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
