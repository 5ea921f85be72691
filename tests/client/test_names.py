"""Aliases, splits, labels, pins, history, merges and mixes, by both clients and the CLI."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import grpc
import pytest

from adaplex.client import AliasTarget, Client, InvalidArgument
from adaplex.v1 import adapters_pb2 as pb
from client.canned import DIGEST
from client.fake_server import FakeServer


def test_a_split_is_sent_by_version_and_share(call: Any, server: FakeServer) -> None:
    adapter = call("adapters.set_alias", "tone", "prod", {3: 95, 4: 5})
    assert adapter.aliases["default"] == (AliasTarget(3, 95.0), AliasTarget(4, 5.0))
    [sent] = server.requests
    assert [(t.version, t.weight) for t in sent.targets] == [(3, 95.0), (4, 5.0)]
    call("adapters.set_alias", "tone", "prod", 7)
    assert [(t.version, t.weight) for t in server.requests[1].targets] == [(7, 1.0)]


def test_aliases_are_removed_and_rolled_back(call: Any, server: FakeServer) -> None:
    call("adapters.delete_alias", "tone", "prod")
    call("adapters.rollback", "tone")
    assert [type(sent).__name__ for sent in server.requests] == [
        "DeleteAliasRequest",
        "RollbackAliasRequest",
    ]
    assert server.requests[1].alias == "default"


def test_an_update_sends_only_what_is_given(call: Any, server: FakeServer) -> None:
    call("adapters.update", "tone", pinned=False)
    call("adapters.update", "tone", set_labels={"k": "v"}, remove_labels=["x"], description="")
    first, second = server.requests
    assert first.HasField("pinned")
    assert not first.HasField("description")
    assert second.HasField("description")
    assert not second.HasField("pinned")
    assert (dict(second.set_labels), list(second.remove_labels)) == ({"k": "v"}, ["x"])


def test_history_and_versions_come_back_as_values(call: Any) -> None:
    [event] = call("adapters.history", "tone")
    assert (event.kind, event.alias, event.actor) == ("alias", "prod", "ada")
    assert event.after == (AliasTarget(3, 95.0), AliasTarget(4, 5.0))
    details = call("adapters.get", "tone@prod")
    assert [version.version for version in details.versions] == [3, 4]


def test_a_merge_is_sent_whole(call: Any, server: FakeServer) -> None:
    done = call(
        "adapters.merge", "both", {"a": 0.7, "b@2": 0.3}, method="ties", density=0.5, replace=True
    )
    assert done.created
    [sent] = server.requests
    assert sent.method == pb.MERGE_METHOD_TIES
    assert sent.policy == pb.UPLOAD_POLICY_REPLACE
    assert [(s.adapter, s.weight) for s in sent.sources] == [("a", 0.7), ("b@2", 0.3)]
    assert sent.density == 0.5
    assert not sent.HasField("rank")
    for bad in ("unspecified", "sum"):
        with pytest.raises(InvalidArgument) as caught:
            call("adapters.merge", "both", {"a": 1}, method=bad)
        assert caught.value.violations[0].field == "method"


def test_a_mix_is_sent_with_its_weights(call: Any, server: FakeServer) -> None:
    answer = call("generate", "hi", adapters=[("a", 0.7), ("b@1", 0.3)], routing_key="user-7")
    assert [(c.name, c.weight) for c in answer.adapter.components] == [("a", 0.7), ("b@1", 0.3)]
    [sent] = server.requests
    assert sent.spec.routing_key == "user-7"
    assert server.metadata[0]["x-adapter-id"] == "a+b@1"


def test_selectors_without_weight_have_weight_1_and_invalid_ones_are_named(
    call: Any, server: FakeServer
) -> None:
    call("generate", "hi", adapters=["b", ("a", 0.5)])
    assert [(p.adapter, p.weight) for p in server.requests[0].spec.adapters] == [
        ("b", 1.0),
        ("a", 0.5),
    ]
    assert server.metadata[0]["x-adapter-id"] == "a+b"
    for bad in ("tone", [("a", 1, 2)], [(1, 2)]):
        with pytest.raises(InvalidArgument) as caught:
            call("generate", "hi", adapters=bad)
        assert caught.value.violations[0].field == "spec.adapters"
    for keywords in ({"adapter": "a", "adapters": ["b"]}, {"adapters": [5]}, {"adapters": 5}):
        with pytest.raises(InvalidArgument) as caught:
            call("generate", "hi", **keywords)
        assert caught.value.violations[0].field == "spec.adapters"
    call("adapters.merge", "x", ["a", ("b", 0.5)])
    assert [(s.adapter, s.weight) for s in server.requests[1].sources] == [("a", 1.0), ("b", 0.5)]
    assert len(server.requests) == 2
    with pytest.raises(TypeError, match="desity"):
        call("adapters.merge", "x", {"a": 1}, desity=0.5)


def test_a_selector_out_of_ascii_is_named(call: Any, server: FakeServer) -> None:
    for keywords, field in (
        ({"adapters": ["a", "naïve"]}, "spec.adapters"),
        ({"adapter": "naïve"}, "spec.adapter"),
    ):
        with pytest.raises(InvalidArgument) as caught:
            call("generate", "hi", **keywords)
        assert caught.value.violations[0].field == field
    assert server.requests == []


def test_the_targets_of_an_adapter_can_be_set_again(call: Any, server: FakeServer) -> None:
    adapter = call("adapters.get", "tone").adapter
    call("adapters.set_alias", "tone", "prod", adapter.aliases["default"])
    assert [(t.version, t.weight) for t in server.requests[1].targets] == [(3, 95.0), (4, 5.0)]
    with pytest.raises(InvalidArgument) as caught:
        call("adapters.set_alias", "tone", "prod", [3, 4])
    assert caught.value.violations[0].field == "targets"


def test_an_adapter_can_be_a_member_of_a_set(call: Any) -> None:
    first, again = (call("adapters.get", "tone").adapter for _ in range(2))
    assert {first, again} == {first}


def test_control_characters_of_others_do_not_reach_a_terminal(run: Any, server: FakeServer) -> None:
    server.names = ["a\x1b[2Jb"]
    shown = run("adapters", "ls").stdout
    assert "\x1b" not in shown
    assert "a[2Jb" in shown
    assert run("adapters", "load", "a\x1bb", "/srv/x").stdout.startswith("ab@1 ")
    assert "ab@1" in run("adapters", "show", "a\x1bb").stdout
    server.fail(grpc.StatusCode.INTERNAL, "bad \x1b[2J end")
    assert run("adapters", "ls").stderr == "error: bad [2J end\n"


def test_refusals_print_no_control_characters_and_no_extra_line(
    run: Any, server: FakeServer, adapter_directory: Path
) -> None:
    server.refusals = [("x\x1b[2J", "no\nvalid\x9b")]
    assert "refused: x[2J: no valid\n" in run("adapters", "verify", adapter_directory).stdout


def test_the_environment_names_the_actor(
    run: Any, server: FakeServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ADAPLEX_ACTOR", "ada")
    run("adapters", "rm", "tone@3")
    assert server.metadata[0]["x-adaplex-actor"] == "ada"
    assert server.requests[0].name == "tone@3"
    run("--actor", "bo", "adapters", "ls", "--prefix", "t", "--label", "k=v", "--sort", "name desc")
    assert server.metadata[1]["x-adaplex-actor"] == "bo"
    assert server.requests[1].filter.name_prefix == "t"
    assert dict(server.requests[1].filter.labels) == {"k": "v"}
    run("adapters", "ls", "--family", "lora")
    assert server.requests[2].filter.family == "lora"
    assert server.requests[1].order_by == "name desc"


@pytest.mark.parametrize("actor", ["", "x" * 129])
def test_an_actor_has_1_to_128_characters(
    connect: Callable[..., Any], server: FakeServer, actor: str
) -> None:
    with pytest.raises(InvalidArgument, match="1 to 128 characters") as caught:
        connect(server.target, actor=actor)
    assert caught.value.violations[0].field == "actor"


def test_the_actor_goes_with_every_call(connect: Callable[..., Any], server: FakeServer) -> None:
    connect(server.target, actor="ci-bot")("adapters.delete", "tone")
    assert server.metadata[0]["x-adaplex-actor"] == "ci-bot"
    with pytest.raises(InvalidArgument) as caught:
        Client(server.target, actor="naïve")
    assert caught.value.violations[0].field == "x-adaplex-actor"


def test_a_list_is_filtered_and_ordered(call: Any, server: FakeServer) -> None:
    list_ = call("adapters.list", name_prefix="a", labels={"k": "v"}, order_by="name desc")
    assert len(list_) == 5
    for sent in server.requests:
        assert sent.filter.name_prefix == "a"
        assert dict(sent.filter.labels) == {"k": "v"}
        assert sent.order_by == "name desc"


def test_a_signature_is_sent_beside_the_files(
    call: Any, server: FakeServer, adapter_directory: Path
) -> None:
    (adapter_directory / "model.sig").write_bytes(b"{}")
    call("adapters.upload", "tone", adapter_directory)
    assert [file.name for file in server.uploads[0].metadata.files][-1] == "model.sig"
    assert server.uploads[0].content(2) == b"{}"


def test_the_command_line_sets_and_shows_aliases(run: Any, server: FakeServer) -> None:
    shown = run("adapters", "alias", "set", "tone", "prod", "3:95", "4:5").stdout
    assert "default -> @3 95%, @4 5%" in shown
    assert [(t.version, t.weight) for t in server.requests[0].targets] == [(3, 95), (4, 5)]
    run("adapters", "rollback", "tone", "prod")
    run("adapters", "alias", "rm", "tone", "prod")
    run("adapters", "pin", "tone")
    run("adapters", "unpin", "tone")
    run("adapters", "label", "tone", "team=red", "--remove", "old")
    run("adapters", "describe", "tone", "for tests")
    pin, unpin, label, describe = server.requests[3:]
    assert (pin.pinned, unpin.pinned, describe.description) == (True, False, "for tests")
    assert (dict(label.set_labels), list(label.remove_labels)) == ({"team": "red"}, ["old"])
    history = run("adapters", "history", "tone").stdout
    assert "alias prod: @3 -> @3 95%, @4 5%" in history
    assert json.loads(run("adapters", "history", "tone", "--json").stdout)[0]["actor"] == "ada"


def test_history_keeps_the_detail_of_a_version(run: Any, server: FakeServer) -> None:
    upload = pb.AdapterEvent(kind="upload", version=3, digest=DIGEST, detail="forced")
    server.history = [upload, pb.AdapterEvent(kind="update", detail="pinned")]
    shown = run("adapters", "history", "tone").stdout
    assert "upload @3 sha256:abababababab forced" in shown
    assert "update pinned" in shown


def test_the_command_line_merges_and_mixes(run: Any, server: FakeServer) -> None:
    merged = run("adapters", "merge", "both", "a:0.7", "b", "--method", "svd", "--rank", "4")
    run("adapters", "merge", "both", "a", "b", "--method", "ties", "--majority-sign", "frequency")
    assert server.requests.pop().majority_sign == "frequency"
    assert "both@1" in merged.stdout
    assert [(s.adapter, s.weight) for s in server.requests[0].sources] == [("a", 0.7), ("b", 1.0)]
    digest = "sha256:" + "c" * 64
    run("generate", "-a", "a:0.5", "-a", f"{digest}:0.25", "-a", digest, "hi")
    parts = server.requests[1].spec.adapters
    assert [(p.adapter, p.weight) for p in parts] == [("a", 0.5), (digest, 0.25), (digest, 1.0)]
    run("generate", "-a", digest, "hi")
    assert server.requests[2].spec.adapter == digest


@pytest.mark.parametrize(
    "arguments",
    [
        ["adapters", "alias", "set", "tone", "prod", "x"],
        ["adapters", "alias", "set", "tone", "prod", "3:x"],
        ["adapters", "label", "tone", "team"],
        ["generate", "-a", "a:much", "hi"],
        ["generate", "-a", "a:nan", "hi"],
        ["generate", "-a", "a:inf", "hi"],
        ["generate", "-a", ":0.5", "hi"],
        ["generate", "-a", "", "hi"],
        ["generate", "-a", "sha256:", "hi"],
        ["adapters", "merge", "both", "a:nan"],
        ["adapters", "alias", "set", "tone", "prod", "3:inf"],
        ["adapters", "alias", "set", "tone", "prod", "3:95", "3:5"],
        ["adapters", "label", "tone"],
    ],
)
def test_invalid_arguments_are_usage_errors(run: Any, arguments: list[str]) -> None:
    result = run(*arguments)
    assert result.exit_code == 2
    assert "Invalid value" in result.output
