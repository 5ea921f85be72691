"""Pins, combinations, merges, and adapters that are looked for on first use, over the wire."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import grpc
import pytest

from adaplex.v1 import adapters_pb2 as pb
from adaplex.v1.generation_pb2 import WeightedAdapter
from server.calls import ACTOR, applied, ask, point, status, target, until, versions
from server.toy import adapter_files, rig


async def test_a_pin_brings_the_adapter_in_and_follows_a_flip(tmp_path: Path) -> None:
    async with rig(tmp_path) as toy:
        one, two = await versions(toy)
        pinned = await toy.adapters.UpdateAdapter(pb.UpdateAdapterRequest(name="a", pinned=True))
        assert pinned.adapter.pinned
        await until(lambda: toy.engine.stats().resident == {two})
        await point(toy, "default", target(1))
        await until(lambda: one in toy.engine.stats().resident)
        assert toy.engine.stats().pinned == {one}
        info = await toy.info.GetServerInfo(server_info())
        assert 0 < info.capacity.pinned_bytes_used <= info.capacity.pinned_bytes_total
        await toy.adapters.UpdateAdapter(pb.UpdateAdapterRequest(name="a", pinned=False))
        assert toy.engine.stats().pinned == frozenset()


async def test_a_pinned_adapter_that_is_unloaded_comes_back(tmp_path: Path) -> None:
    async with rig(tmp_path) as toy:
        (one,) = await versions(toy, 1)
        await toy.adapters.UpdateAdapter(pb.UpdateAdapterRequest(name="a", pinned=True))
        await until(lambda: toy.engine.stats().resident == {one})
        await toy.adapters.UnloadAdapter(pb.UnloadAdapterRequest(name="a"))
        assert toy.engine.stats().pinned == frozenset()
        await toy.server._pins.follow()
        await until(lambda: toy.engine.stats().resident == {one})


async def test_a_pin_beyond_the_bound_is_refused_and_not_noted(tmp_path: Path) -> None:
    async with rig(tmp_path, engine={"arena_bytes": 512}) as toy:
        await versions(toy, 1)
        await toy.upload("b", 5)
        await toy.adapters.UpdateAdapter(pb.UpdateAdapterRequest(name="a", pinned=True))
        call = toy.adapters.UpdateAdapter(pb.UpdateAdapterRequest(name="b", pinned=True))
        code, details = await status(call)
        assert code is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert details["ErrorInfo"].reason == "PINS_FULL"
        assert not (await toy.adapters.GetAdapter(pb.GetAdapterRequest(name="b"))).adapter.pinned


def server_info() -> Any:
    from adaplex.v1.server_pb2 import GetServerInfoRequest

    return GetServerInfoRequest()


async def test_a_combination_is_proven_part_by_part(tmp_path: Path) -> None:
    async with rig(tmp_path) as toy:
        first, second = await versions(toy, 1), await versions(toy, 2, name="b")
        parts = [WeightedAdapter(adapter="a", weight=0.7), WeightedAdapter(adapter="b@1")]
        found = await applied(toy, adapters=parts)
        assert (found.name, found.version, found.modules) == ("a+b", 0, 2)
        assert [(c.name, c.version, c.digest, c.weight) for c in found.components] == [
            ("a", 1, first[0], 0.7),
            ("b", 1, second[0], 1.0),
        ]
        assert found.digest not in (first[0], second[0])
        assert found.digest in toy.engine.stats().resident
        again = await applied(toy, adapters=parts[::-1])
        assert again.digest == found.digest


@pytest.mark.parametrize(
    ("fields", "field"),
    [
        ({"adapter": "a", "adapters": [WeightedAdapter(adapter="b")]}, "spec.adapters"),
        ({"adapters": [WeightedAdapter(weight=1.0)]}, "spec.adapters[0].adapter"),
        ({"adapters": [WeightedAdapter(adapter="a")] * 9}, "spec.adapters"),
        ({"adapters": [WeightedAdapter(adapter="a", weight=11)]}, "adapters"),
        ({"adapter": "a", "routing_key": "x" * 257}, "spec.routing_key"),
    ],
)
async def test_bad_combinations(tmp_path: Path, fields: Any, field: str) -> None:
    async with rig(tmp_path) as toy:
        await versions(toy, 1)
        code, details = await status(toy.generation.Generate(ask(**fields)))
        assert code is grpc.StatusCode.INVALID_ARGUMENT
        assert details["BadRequest"].field_violations[0].field == field


async def test_a_merge_is_a_stored_adapter(tmp_path: Path) -> None:
    async with rig(tmp_path) as toy:
        await versions(toy, 1)
        await versions(toy, 2, name="b")
        request = pb.MergeAdaptersRequest(
            name="both",
            method=pb.MERGE_METHOD_TIES,
            density=0.5,
            sources=[
                pb.WeightedSource(adapter="a", weight=0.6),
                pb.WeightedSource(adapter="b@2", weight=0.4),
            ],
        )
        merged = await toy.adapters.MergeAdapters(request, metadata=ACTOR)
        assert merged.created
        assert merged.adapter.source == "merge ties a@1:0.6 b@2:0.4"
        assert merged.adapter.actor == "ci-bot"
        assert (await applied(toy, "both")).digest == merged.adapter.digest
        assert not (await toy.adapters.MergeAdapters(request)).created
        request.ClearField("density")
        code, details = await status(toy.adapters.MergeAdapters(request))
        assert code is grpc.StatusCode.INVALID_ARGUMENT
        assert details["BadRequest"].field_violations[0].field == "density"


async def test_an_unknown_adapter_is_looked_for_once_and_used(tmp_path: Path) -> None:
    tree = tmp_path / "tree"
    folder = tree / "lazy"
    folder.mkdir(parents=True)
    for name, data in adapter_files(3).items():
        (folder / name).write_bytes(data)
    async with rig(tmp_path, resolve_from=f"{tree}/{{name}}") as toy:
        answers = await asyncio.gather(*(applied(toy, "lazy") for _ in range(8)))
        assert {answer.version for answer in answers} == {1}
        stored = await toy.adapters.GetAdapter(pb.GetAdapterRequest(name="lazy"))
        assert stored.adapter.source == str(folder)
        assert stored.adapter.actor == "first use"
        for unknown in ("nobody", "lazy@7", "lazy@prod"):
            code, _ = await status(toy.generation.Generate(ask(unknown)))
            assert code is grpc.StatusCode.NOT_FOUND


async def test_the_wait_for_a_lazy_adapter_is_told(tmp_path: Path) -> None:
    tree = tmp_path / "tree"
    (tree / "lazy").mkdir(parents=True)
    for name, data in adapter_files(3).items():
        (tree / "lazy" / name).write_bytes(data)
    async with rig(tmp_path, resolve_from=f"{tree}/{{name}}") as toy:
        cold = await toy.generation.Generate(ask("lazy"))
        warm = await toy.generation.Generate(ask("lazy"))
        assert cold.finished.adapter_wait_seconds > warm.finished.adapter_wait_seconds > 0


async def test_a_combination_waits_for_a_part_that_must_be_fetched(tmp_path: Path) -> None:
    tree = tmp_path / "tree"
    (tree / "lazy").mkdir(parents=True)
    for name, data in adapter_files(3).items():
        (tree / "lazy" / name).write_bytes(data)
    async with rig(tmp_path, resolve_from=f"{tree}/{{name}}") as toy:
        await versions(toy, 1)
        parts = [WeightedAdapter(adapter="lazy"), WeightedAdapter(adapter="a@1")]
        assert (await applied(toy, adapters=parts)).name == "lazy+a"


async def test_a_split_is_shown_by_one_side_and_unloaded_by_both(tmp_path: Path) -> None:
    async with rig(tmp_path) as toy:
        one, two = await versions(toy)
        await point(toy, "default", target(1), target(2))
        await applied(toy, "a@1")
        await applied(toy, "a@2")
        assert toy.engine.stats().resident == {one, two}
        get = pb.GetAdapterRequest(name="a")
        shown = {(await toy.adapters.GetAdapter(get)).adapter.digest for _ in range(10)}
        assert len(shown) == 1
        await toy.adapters.UnloadAdapter(pb.UnloadAdapterRequest(name="a"))
        assert toy.engine.stats().resident == frozenset()


async def test_tiers_are_told(tmp_path: Path) -> None:
    async with rig(tmp_path, engine={"arena_bytes": 256, "host_bytes": 4096}) as toy:
        for i, name in enumerate("abc"):
            await toy.upload(name, i)

        async def tier(name: str) -> int:
            got = await toy.adapters.GetAdapter(pb.GetAdapterRequest(name=name))
            return int(got.adapter.tier)

        assert await tier("a") == pb.RESIDENCY_TIER_DISK
        await applied(toy, "a")
        assert await tier("a") == pb.RESIDENCY_TIER_ARENA
        await applied(toy, "b")
        assert await tier("a") == pb.RESIDENCY_TIER_HOST
        assert await tier("b") == pb.RESIDENCY_TIER_ARENA


async def test_a_base_that_changed_is_warned_about_in_the_answer(tmp_path: Path) -> None:
    files = adapter_files(0, base_model_name_or_path="org/other")
    from server.toy import upload_messages

    async with rig(tmp_path) as toy:
        done = await toy.send("UploadAdapter", upload_messages(files))
        assert "org/other" in done.report.warnings[0]
        assert "org/other" in (await applied(toy, "a")).warnings[0]
        assert (await applied(toy, "")).name == ""
    async with rig(tmp_path / "strict", base_policy="refuse") as toy:
        with pytest.raises(grpc.RpcError) as caught:
            await toy.send("UploadAdapter", upload_messages(files))
        assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
