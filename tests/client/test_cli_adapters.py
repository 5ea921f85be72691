from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from client.canned import DIGEST
from client.fake_server import FakeServer


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
