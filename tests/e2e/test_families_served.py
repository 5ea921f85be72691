"""Adapters of all families through the whole server: upload, one batch, reports and metrics."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path

import pytest

from adaplex.client import Generation, InvalidArgument
from e2e.conftest import Serving
from peft_adapters import load_plain
from peft_families import FAMILIES, LORAS
from peft_kinds import save_kind

NAMES = ("lora", "dora", "lora-tokens", "lora-whole", "vera", "loha", "ia3", "ln-tuning", "bitfit")
BEFORE = ("prompt-tuning", "prefix-tuning")
"""Families that put five positions before the prompt."""
MERGED = ("OFT", "HIRA")
PROMPT = "The quick brown fox jumps over the lazy dog"


@pytest.fixture(scope="module")
def saved(
    tiny_model: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Path]:
    work, model = tmp_path_factory.mktemp("families"), tiny_model("llama")
    every = {**LORAS, **FAMILIES}
    made = {name: every[name].save(model, work / name, 3) for name in (*NAMES, *BEFORE)}
    for kind in MERGED:
        save_kind(load_plain(model), work / kind, kind)
        made[kind] = work / kind
    return made


@pytest.mark.slow
async def test_every_family_answers_in_a_batch_as_alone(
    serving: Serving, saved: dict[str, Path]
) -> None:
    async with serving(merged_bytes="16MiB", kv_cache_bytes="16MiB") as rig:
        families = {}
        for name, directory in saved.items():
            sent = await rig.client.adapters.upload(name, directory)
            assert sent.created, name
            families[name] = sent.adapter.family

        async def ask(name: str | None) -> Generation:
            return await rig.client.generate(PROMPT, adapter=name, max_tokens=12, ignore_eos=True)

        names = [None, *saved, None]
        together = await asyncio.gather(*map(ask, names))
        alone = [await ask(name) for name in names]
        assert [g.token_ids for g in together] == [g.token_ids for g in alone]
        for name, got in zip(names, together, strict=True):
            assert (got.adapter.name if got.adapter else None) == name
            assert got.usage.prompt_tokens == together[0].usage.prompt_tokens
            if name is not None:
                assert got.adapter is not None
                assert str(got.adapter.mode) == ("merged" if name in MERGED else "unmerged"), name
                assert got.token_ids != together[0].token_ids, f"{name} does nothing"
        assert len(set(families.values())) > len(NAMES)

        reports = [(await rig.client.adapters.get(name)).report for name in MERGED]
        assert all(report.merged_bytes > 0 for report in reports)
        used = sum(report.merged_bytes for report in reports)
        capacity = (await rig.client.server_info()).capacity
        assert (capacity.merged_bytes_used, capacity.merged_bytes_total) == (used, 16 << 20)
        assert capacity.adapters_resident == len(saved)
        label = {"tier": "merged", "model_name": rig.parts.model.name}
        read = rig.parts.prometheus.get_sample_value
        assert read("adaplex_adapter_resident_bytes", label) == used
        assert all(read("adaplex_adapter_state", label | {"adapter": name}) == 1 for name in MERGED)

        with pytest.raises(InvalidArgument, match="can only be served merged"):
            await rig.client.generate(PROMPT, adapter="OFT", mode="unmerged")
        halves = {"lora": 0.5, "prefix-tuning": 0.5}
        with pytest.raises(InvalidArgument, match="cannot be combined"):
            await rig.client.generate(PROMPT, adapters=halves)


async def test_a_merged_only_adapter_is_refused_without_memory_for_merged_weights(
    serving: Serving, saved: dict[str, Path]
) -> None:
    async with serving(merged_bytes=0) as rig:
        sent = await rig.client.adapters.upload("oft", saved["OFT"])
        assert any("merged" in warning for warning in sent.report.warnings)
        with pytest.raises(InvalidArgument, match="keeps no merged weights"):
            await rig.client.generate(PROMPT, adapter="oft")
