from __future__ import annotations

import asyncio
import threading
from pathlib import Path
from typing import Any

import grpc
import pytest

from adaplex.v1 import adapters_pb2 as pb
from adaplex.v1.adapters_pb2 import (
    DeleteAdapterRequest,
    GetAdapterRequest,
    ListAdaptersRequest,
    UnloadAdapterRequest,
)
from adaplex.v1.generation_pb2 import SamplingParams
from server.adapter_uploads import adapter_files
from server.calls import applied, point, status, target, until, versions
from server.fake_model import ScriptedRunner
from server.server_rig import rig


async def test_pages_follow_each_other_by_name(tmp_path: Path) -> None:
    async with rig(tmp_path) as toy:
        for name in "cab":
            await toy.upload(name, seed=ord(name))
        first = await toy.adapters.ListAdapters(ListAdaptersRequest(page_size=2))
        assert [a.name for a in first.adapters] == ["a", "b"]
        rest = await toy.adapters.ListAdapters(
            ListAdaptersRequest(page_size=2, page_token=first.next_page_token)
        )
        assert [a.name for a in rest.adapters] == ["c"]
        assert rest.next_page_token == ""


@pytest.mark.parametrize(
    ("field", "fields"), [("page_size", {"page_size": 1001}), ("page_token", {"page_token": "/"})]
)
async def test_a_page_out_of_range_is_refused(
    tmp_path: Path, field: str, fields: dict[str, Any]
) -> None:
    async with rig(tmp_path) as toy:
        code, details = await status(toy.adapters.ListAdapters(ListAdaptersRequest(**fields)))
    assert code is grpc.StatusCode.INVALID_ARGUMENT
    assert details["BadRequest"].field_violations[0].field == field


async def test_unload_frees_memory_and_keeps_the_adapter(tmp_path: Path) -> None:
    async with rig(tmp_path) as toy:
        await toy.upload("a")
        await toy.generate("x", adapter="a")
        request = UnloadAdapterRequest(name="a")
        assert (await toy.adapters.UnloadAdapter(request)).was_resident
        assert not (await toy.adapters.UnloadAdapter(request)).was_resident
        assert not toy.engine.stats().resident
        assert (await toy.generate("x", adapter="a")).text


async def test_a_running_request_outlives_the_deletion_of_its_adapter(tmp_path: Path) -> None:
    runner = ScriptedRunner(lambda request: [65])
    async with rig(tmp_path, runner=runner) as toy:
        stored = await toy.upload("a")
        runner.gate.clear()
        running = asyncio.ensure_future(
            toy.generate("x", adapter="a", sampling=SamplingParams(max_tokens=5))
        )
        await until(lambda: toy.engine.stats().running == 1)
        deleted = await toy.adapters.DeleteAdapter(DeleteAdapterRequest(name="a"))
        assert deleted.versions_deleted == 1
        code, _ = await status(toy.generate("x", adapter="a"))
        assert code is grpc.StatusCode.NOT_FOUND
        runner.gate.set()
        answer = await running
        assert answer.text == "A" * 5
        assert answer.started.adapter.digest == stored.adapter.digest
        await until(lambda: not toy.engine.stats().resident)


@pytest.mark.parametrize("rpc", ["GetAdapter", "UnloadAdapter", "DeleteAdapter"])
async def test_what_is_not_there_is_not_found(tmp_path: Path, rpc: str) -> None:
    request = getattr(pb, f"{rpc}Request")(name="nobody")
    async with rig(tmp_path) as toy:
        code, _ = await status(getattr(toy.adapters, rpc)(request))
    assert code is grpc.StatusCode.NOT_FOUND


async def test_questions_about_adapters_do_not_starve_generation(tmp_path: Path) -> None:
    may_go = threading.Event()
    async with rig(tmp_path) as toy:
        await toy.upload("a")
        registry = toy.components.registry
        report = registry.programs.report

        def slow(digest: str) -> Any:
            may_go.wait(10)
            return report(digest)

        registry.programs.report = slow  # type: ignore[method-assign]
        flood = [
            asyncio.ensure_future(toy.adapters.GetAdapter(GetAdapterRequest(name="a")))
            for _ in range(64)
        ]
        await until(lambda: len(toy.server._edge.inflight) == 64)
        try:
            answer = await asyncio.wait_for(toy.generate("x", adapter="a"), 5)
        finally:
            may_go.set()
        assert answer.text
        await asyncio.gather(*flood)


async def test_content_that_goes_with_its_last_request_leaves_the_memory(tmp_path: Path) -> None:
    async with rig(tmp_path, runner=ScriptedRunner(slow=0.01)) as toy:
        stored = await toy.upload("a")
        toy.runner.gate.clear()
        running = asyncio.ensure_future(
            toy.generate("x", adapter="a", sampling=SamplingParams(max_tokens=200, ignore_eos=True))
        )
        await until(lambda: toy.engine.stats().running == 1)
        await toy.adapters.DeleteAdapter(DeleteAdapterRequest(name="a"))
        assert stored.adapter.digest in toy.engine.stats().resident, "it is in use"
        assert toy.components.registry.garbage.orphans() == {stored.adapter.digest}
        toy.runner.gate.set()
        assert (await running).started.adapter.digest == stored.adapter.digest
        await until(lambda: not toy.engine.stats().resident)
        await until(lambda: not toy.components.registry.garbage.orphans())


async def test_a_cancelled_request_gives_its_lease_back(tmp_path: Path) -> None:
    resolving, may_go = threading.Event(), threading.Event()
    async with rig(tmp_path) as toy:
        await toy.upload("a")
        registry = toy.components.registry
        resolve = registry.resolve

        def slow(selector: str, **options: Any) -> Any:
            resolving.set()
            may_go.wait(5)
            return resolve(selector, **options)

        registry.resolve = slow  # type: ignore[method-assign]
        call = toy.generate("x", adapter="a")
        await asyncio.to_thread(resolving.wait, 5)
        call.cancel()
        may_go.set()
        await until(lambda: len(toy.server._edge.inflight) == 0)


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
    async with rig(tmp_path) as toy:
        done = await toy.upload_files(files)
        assert "org/other" in done.report.warnings[0]
        assert "org/other" in (await applied(toy, "a")).warnings[0]
        assert (await applied(toy, "")).name == ""
    async with rig(tmp_path / "strict", base_policy="refuse") as toy:
        with pytest.raises(grpc.RpcError) as caught:
            await toy.upload_files(files)
        assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
