"""Reuse of a prompt's KV within one content and one tenant, whatever happens to names."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from adaplex.v1 import adapters_pb2 as pb
from adaplex.v1.generation_pb2 import WeightedAdapter
from server.calls import point, target
from server.server_rig import ServerRig, rig

PROMPT = "the same long beginning of every prompt, of more than two blocks and a bit"
WHOLE = len(PROMPT) // 16 * 16
"""Tokens of its full blocks."""


async def cached(toy: ServerRig, adapter: str = "", **fields: Any) -> int:
    answer = await toy.generate(PROMPT, adapter=adapter, **fields)
    return int(answer.finished.cached_tokens)


async def test_hits_follow_the_content_not_the_name(tmp_path: Path) -> None:
    async with rig(tmp_path, engine={"block_tokens": 16, "num_blocks": 129}) as toy:
        await toy.upload("a", 0)
        assert [await cached(toy, "a") for _ in range(2)] == [0, WHOLE]
        assert await cached(toy) == 0, "the base shares nothing with an adapter"
        await toy.upload("a", 1, replace=True)
        assert [await cached(toy, "a") for _ in range(2)] == [0, WHOLE]
        await point(toy, "default", target(1))
        assert await cached(toy, "a") == WHOLE, "back to the first content, whose KV is kept"
        await toy.upload("b", 0)
        assert await cached(toy, "b") == WHOLE, "the same content under another name"


async def test_nothing_is_shared_between_tenants(tmp_path: Path) -> None:
    async with rig(tmp_path, engine={"block_tokens": 16, "num_blocks": 129}) as toy:
        await toy.upload("a", 0)
        assert await cached(toy, "a", cache_salt="one") == 0
        assert await cached(toy, "a", cache_salt="two") == 0
        assert await cached(toy, "a", cache_salt="one") == WHOLE


async def test_unload_and_delete_leave_nothing_wrong_behind(tmp_path: Path) -> None:
    async with rig(tmp_path, engine={"block_tokens": 16, "num_blocks": 129}) as toy:
        await toy.upload("a", 0)
        await cached(toy, "a")
        await toy.adapters.UnloadAdapter(pb.UnloadAdapterRequest(name="a"))
        assert await cached(toy, "a") == WHOLE, "the KV of a content outlives its weights"
        await toy.adapters.DeleteAdapter(pb.DeleteAdapterRequest(name="a"))
        await toy.upload("a", 1)
        assert await cached(toy, "a") == 0, "another content under the same name"


async def test_a_combination_has_a_cache_of_its_own(tmp_path: Path) -> None:
    async with rig(tmp_path, engine={"block_tokens": 16, "num_blocks": 129}) as toy:
        await toy.upload("a", 0)
        await toy.upload("b", 1)
        await cached(toy, "a")
        parts = [WeightedAdapter(adapter="a", weight=0.5), WeightedAdapter(adapter="b")]
        assert [await cached(toy, adapters=parts) for _ in range(2)] == [0, WHOLE]
        other = [WeightedAdapter(adapter="a", weight=0.6), WeightedAdapter(adapter="b")]
        assert await cached(toy, adapters=other) == 0
