"""Mixes of adapters in one request, and merges into a stored adapter, over the wire."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import grpc
import pytest

from adaplex.v1 import adapters_pb2 as pb
from adaplex.v1.generation_pb2 import WeightedAdapter
from server.calls import ACTOR, applied, status, versions
from server.server_rig import rig


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
        code, details = await status(toy.generate("x", **fields))
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
