"""What is known of an adapter beside its weights: on its way to requests, and in old catalogs."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from adaplex.adapters import formats
from adaplex.adapters.errors import AdapterInvalid
from adaplex.adapters.program.base_spec import BaseModule, BaseSpec
from adaplex.adapters.program.check_prefix import check_prefix
from adaplex.adapters.program.primitives import KVPrefix
from adaplex.adapters.program.program import AdapterProgram, ModuleProgram
from adaplex.adapters.program.traits import AdapterTraits
from adaplex.adapters.registry.registry import AdapterRegistry
from adaplex.adapters.storage.name_document import from_json, to_json
from adapters.entries import entry
from adapters.handmade import BASE, make_registry, push, stage, tensors
from adapters.handmade import files as made_files

HEADS, KEY, VALUE = 2, 4, 3
BLOCKS = [
    BaseModule(f"model.layers.{i}.self_attn", "block", 8, 8, layer=i, part="attention")
    for i in range(2)
]
TUNABLE = BaseSpec(
    "org/tiny-base",
    "base",
    "llama",
    {m.name: m for m in [*BASE.modules.values(), *BLOCKS]},
    kv_shapes=((HEADS, KEY, VALUE),) * 2,
    weight=lambda name: torch.zeros(
        BASE.modules[name].out_features, BASE.modules[name].in_features
    ),
)
QUERY = "model.layers.0.self_attn.q_proj"


def prefix(tokens: int = 5, heads: int = HEADS, key: int = KEY, value: int = VALUE) -> KVPrefix:
    return KVPrefix(torch.ones(tokens, heads, key), torch.ones(tokens, heads, value))


def program(*prefixes: KVPrefix | None, **fields: Any) -> AdapterProgram:
    modules = [
        ModuleProgram(block.name, prefix=each)
        for block, each in zip(BLOCKS, prefixes, strict=False)
        if each is not None
    ]
    return AdapterProgram("sha256:p", "prefix", tuple(modules), **fields)


def refusals(made: AdapterProgram) -> list[str]:
    with pytest.raises(AdapterInvalid) as caught:
        check_prefix(made, TUNABLE)
    return [f"{r.where}: {r.reason}" for r in caught.value.refusals]


def test_a_whole_prefix_passes() -> None:
    check_prefix(program(prefix(), prefix()), TUNABLE)
    check_prefix(program(), TUNABLE)


def test_a_prefix_that_leaves_out_a_layer_is_refused() -> None:
    """The cache would keep there what another request left."""
    assert refusals(program(prefix(), None)) == [
        "layer 1: has no keys and values before the prompt, but other layers do"
    ]


@pytest.mark.parametrize("other", [prefix(4), prefix(heads=1), prefix(key=8), prefix(value=4)])
def test_a_prefix_of_another_shape_is_refused(other: KVPrefix) -> None:
    [refusal] = refusals(program(prefix(), other))
    assert refusal.startswith("model.layers.1.self_attn: its keys and values before the prompt are")
    assert refusal.endswith("expected (5, 2, 4) and (5, 2, 3)")


def test_a_prefix_at_no_attention_is_refused() -> None:
    stray = ModuleProgram("model.layers.0.mlp.down_proj", prefix=prefix())
    made = program(prefix(), prefix())
    [refusal] = refusals(replace(made, modules=(*made.modules, stray)))
    assert (
        refusal
        == "model.layers.0.mlp.down_proj: is not an attention, so cannot have keys and values"
    )


def test_what_is_invoked_has_nothing_before_the_prompt() -> None:
    [refusal] = refusals(program(prefix(), prefix(), invocation=(7,)))
    assert refusal.startswith("alora_invocation_tokens: cannot be combined with positions")


def lowered_with(monkeypatch: pytest.MonkeyPatch, **facts: Any) -> None:
    """From now on every checkpoint is lowered to a program that also has these."""
    lower = formats.lower

    def changed(*args: Any) -> AdapterProgram:
        made = lower(*args)
        modules = {module.module: module for module in made.modules}
        if facts.get("prefix_tokens"):
            given = prefix(facts["prefix_tokens"])
            modules |= {block.name: ModuleProgram(block.name, prefix=given) for block in BLOCKS}
        if facts.get("merged_only"):
            modules[QUERY] = ModuleProgram(QUERY, transform=lambda weight: weight)
        ordered = tuple(modules[name] for name in sorted(modules))
        return replace(made, modules=ordered, invocation=facts.get("invocation", ()))

    monkeypatch.setattr(formats, "lower", changed)


def registry_with(
    folder: Path, monkeypatch: pytest.MonkeyPatch, facts: dict[str, Any], **options: Any
) -> AdapterRegistry:
    lowered_with(monkeypatch, **facts)
    return make_registry(folder, TUNABLE, **options)


FACTS = [{"prefix_tokens": 5}, {"invocation": (7, 8)}, {"merged_only": True}]


@pytest.mark.parametrize("facts", FACTS)
def test_facts_reach_records_and_reports(
    facts: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    registry = registry_with(tmp_path, monkeypatch, facts)
    done = push(registry, "tone")
    wanted = (
        facts.get("prefix_tokens", 0),
        facts.get("invocation", ()),
        facts.get("merged_only", False),
    )
    report = done.report
    traits = report.traits
    assert (traits.leading, traits.invocation, traits.merged_only) == wanted
    assert (report.prefix_tokens, report.virtual_tokens) == (wanted[0], 0)
    registry.close()
    registry = make_registry(tmp_path, TUNABLE)
    for record in (done.record, registry.names.get("tone")):
        assert record.traits == traits
    registry.close()


def test_reports_name_what_is_applied_where(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    registry = registry_with(tmp_path, monkeypatch, {"prefix_tokens": 5, "merged_only": True})
    applied = {m.module: m.primitives for m in push(registry, "tone").report.modules}
    assert applied[QUERY] == ("merged weight",)
    assert applied[BLOCKS[0].name] == ("KV prefix",)
    assert applied["model.layers.1.self_attn.v_proj"] == ("low-rank",)
    registry.close()


def test_entries_from_before_there_were_facts_can_be_read() -> None:
    document = json.loads(to_json(entry(versions=2)))
    for version in document["versions"]:
        for field in ("leading", "invocation", "merged_only"):
            del version[field]
    found = from_json(json.dumps(document))
    assert found == entry(versions=2)
    traits = AdapterTraits(modules=4, max_rank=8, leading=0, invocation=(), merged_only=False)
    assert [v.traits for v in found.versions] == [traits] * 2


def test_what_is_only_merged_needs_no_arena(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    registry = registry_with(tmp_path, monkeypatch, {"merged_only": True}, max_packed_bytes=10)
    done = push(registry, "tone")
    assert not done.report.warnings
    registry.close()


@pytest.mark.parametrize(
    ("most", "kept"), [(0, "no merged weights"), (100, "100 bytes of merged weights")]
)
def test_a_server_without_room_for_merged_weights_says_what_it_cannot_serve(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, most: int, kept: str
) -> None:
    registry = registry_with(tmp_path, monkeypatch, {"merged_only": True}, max_merged_bytes=most)
    with stage(registry, made_files()) as staging:
        checked = registry.intake.check(staging)
    assert checked.valid
    (warning,) = checked.warnings
    wanted = f"it can only be served merged, in {checked.merged_bytes} bytes"
    assert warning == f"{wanted}, and this server keeps {kept}"
    done = push(registry, "tone")
    assert registry.programs.report(done.record.digest) == done.report == checked
    assert not done.record.warnings, "another server may keep them"
    registry.close()


def test_what_can_only_be_merged_combines_with_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    registry = registry_with(tmp_path, monkeypatch, {"merged_only": True})
    for seed, name in enumerate("ab"):
        push(registry, name, made_files(weights=tensors(seed=seed)))
    with pytest.raises(AdapterInvalid, match=r"adapters: [ab] can only be served merged"):
        registry.resolve_mix([("a", 1.0), ("b", 0.5)])
    assert registry.leased == 0
    registry.close()


def test_a_mix_leads_with_what_one_of_it_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    registry = make_registry(tmp_path, TUNABLE)
    push(registry, "plain")
    with monkeypatch.context() as patch:
        lowered_with(patch, prefix_tokens=5)
        push(registry, "tuned", made_files(weights=tensors(seed=1)))
    with registry.resolve_mix([("plain", 0.5), ("tuned", 1.0)]) as lease:
        assert lease.record.traits.leading == 5
    registry.close()
