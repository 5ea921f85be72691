"""Pinned names over the wire."""

from __future__ import annotations

from pathlib import Path

import grpc

from adaplex.v1 import adapters_pb2 as pb
from adaplex.v1.server_pb2 import GetServerInfoRequest
from server.calls import point, status, target, until, versions
from server.server_rig import rig


async def test_a_pin_brings_the_adapter_in_and_follows_a_flip(tmp_path: Path) -> None:
    async with rig(tmp_path) as toy:
        one, two = await versions(toy)
        pinned = await toy.adapters.UpdateAdapter(pb.UpdateAdapterRequest(name="a", pinned=True))
        assert pinned.adapter.pinned
        await until(lambda: toy.engine.stats().resident == {two})
        await point(toy, "default", target(1))
        await until(lambda: one in toy.engine.stats().resident)
        assert toy.engine.stats().pinned == {one}
        info = await toy.info.GetServerInfo(GetServerInfoRequest())
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
