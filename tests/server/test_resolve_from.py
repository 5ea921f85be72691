"""Unknown adapters that are fetched when a request first names them."""

from __future__ import annotations

import asyncio
from pathlib import Path

import grpc

from adaplex.v1 import adapters_pb2 as pb
from adaplex.v1.generation_pb2 import WeightedAdapter
from server.adapter_uploads import write_adapter
from server.calls import applied, status, versions
from server.server_rig import rig


async def test_an_unknown_adapter_is_looked_for_once_and_used(tmp_path: Path) -> None:
    tree = tmp_path / "tree"
    folder = write_adapter(tree / "lazy", 3)
    async with rig(tmp_path, resolve_from=f"{tree}/{{name}}") as toy:
        answers = await asyncio.gather(*(applied(toy, "lazy") for _ in range(8)))
        assert {answer.version for answer in answers} == {1}
        stored = await toy.adapters.GetAdapter(pb.GetAdapterRequest(name="lazy"))
        assert stored.adapter.source == str(folder)
        assert stored.adapter.actor == "first use"
        for unknown in ("nobody", "lazy@7", "lazy@prod"):
            code, _ = await status(toy.generate("x", adapter=unknown))
            assert code is grpc.StatusCode.NOT_FOUND


async def test_the_wait_for_a_lazy_adapter_is_told(tmp_path: Path) -> None:
    tree = tmp_path / "tree"
    write_adapter(tree / "lazy", 3)
    async with rig(tmp_path, resolve_from=f"{tree}/{{name}}") as toy:
        cold = await toy.generate("x", adapter="lazy")
        warm = await toy.generate("x", adapter="lazy")
        assert cold.finished.adapter_wait_seconds > warm.finished.adapter_wait_seconds > 0


async def test_a_combination_waits_for_a_part_that_must_be_fetched(tmp_path: Path) -> None:
    tree = tmp_path / "tree"
    write_adapter(tree / "lazy", 3)
    async with rig(tmp_path, resolve_from=f"{tree}/{{name}}") as toy:
        await versions(toy, 1)
        parts = [WeightedAdapter(adapter="lazy"), WeightedAdapter(adapter="a@1")]
        assert (await applied(toy, adapters=parts)).name == "lazy+a"
