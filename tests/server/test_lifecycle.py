"""Versions, aliases, history and lists over the wire."""

from __future__ import annotations

import base64
import json
from collections import Counter
from pathlib import Path
from typing import Any

import grpc
import pytest

from adaplex.v1 import adapters_pb2 as pb
from server.calls import ACTOR, applied, point, status, target, versions
from server.server_rig import rig


async def test_a_flip_and_a_rollback_are_seen_by_the_next_request(tmp_path: Path) -> None:
    async with rig(tmp_path) as toy:
        one, two = await versions(toy)
        assert (await applied(toy, "a")).alias == "latest"
        flipped = await point(toy, "default", target(1))
        assert flipped.aliases[0].alias == "default"
        found = await applied(toy, "a")
        assert (found.digest, found.version, found.alias) == (one, 1, "default")
        assert (await applied(toy, "a@latest")).digest == two
        await toy.adapters.RollbackAlias(pb.RollbackAliasRequest(name="a"))
        assert (await applied(toy, "a")).digest == two
        await toy.adapters.RollbackAlias(pb.RollbackAliasRequest(name="a"))
        assert (await applied(toy, "a")).digest == one
        await toy.adapters.DeleteAlias(pb.DeleteAliasRequest(name="a", alias="default"))
        assert (await applied(toy, "a")).alias == "latest"


async def test_a_canary_gets_its_share_and_keys_stick(tmp_path: Path) -> None:
    async with rig(tmp_path) as toy:
        one, two = await versions(toy)
        await point(toy, "prod", target(1, 80), target(2, 20))
        sides = {}
        for key in map(str, range(60)):
            sides[key] = (await applied(toy, "a@prod", routing_key=key)).digest
        counts = Counter(sides.values())
        assert set(counts) == {one, two}
        assert counts[one] > counts[two]
        for key in list(sides)[:10]:
            assert (await applied(toy, "a@prod", routing_key=key)).digest == sides[key]


async def test_history_names_the_actor(tmp_path: Path) -> None:
    async with rig(tmp_path) as toy:
        await versions(toy)
        await point(toy, "prod", target(1, 3), target(2))
        await toy.adapters.DeleteAdapter(pb.DeleteAdapterRequest(name="a"), metadata=ACTOR)
        history = await toy.adapters.GetAdapterHistory(pb.GetAdapterHistoryRequest(name="a"))
        kinds = [event.kind for event in history.events]
        assert kinds == ["delete", "alias", "upload", "upload"]
        assert history.events[1].actor == history.events[0].actor == "ci-bot"
        assert history.events[2].source == "upload"
        assert [(t.version, t.weight) for t in history.events[1].after] == [(1, 3), (2, 1)]
        bad = toy.adapters.GetAdapterHistory(
            pb.GetAdapterHistoryRequest(name="a"), metadata=(("x-adaplex-actor", "x" * 129),)
        )
        code, details = await status(bad)
        assert code is grpc.StatusCode.INVALID_ARGUMENT
        assert details["BadRequest"].field_violations[0].field == "x-adaplex-actor"


async def test_labels_filter_order_and_pages(tmp_path: Path) -> None:
    async with rig(tmp_path) as toy:
        for seed, name in enumerate(["b-1", "b-2", "c-1"]):
            await toy.upload(name, seed)
            await toy.adapters.UpdateAdapter(
                pb.UpdateAdapterRequest(
                    name=name, set_labels={"team": name[0]}, description=f"the {name}"
                )
            )
        listed = await toy.adapters.ListAdapters(
            pb.ListAdaptersRequest(
                page_size=1, filter=pb.AdapterFilter(labels={"team": "b"}), order_by="name desc"
            )
        )
        assert [(a.name, a.description) for a in listed.adapters] == [("b-2", "the b-2")]
        rest = pb.ListAdaptersRequest(
            page_size=5,
            filter=pb.AdapterFilter(labels={"team": "b"}),
            order_by="name desc",
            page_token=listed.next_page_token,
        )
        assert [a.name for a in (await toy.adapters.ListAdapters(rest)).adapters] == ["b-1"]
        rest.order_by = "name"
        code, details = await status(toy.adapters.ListAdapters(rest))
        assert code is grpc.StatusCode.INVALID_ARGUMENT
        assert details["BadRequest"].field_violations[0].field == "page_token"
        by_prefix = pb.ListAdaptersRequest(filter=pb.AdapterFilter(name_prefix="c"))
        assert [a.name for a in (await toy.adapters.ListAdapters(by_prefix)).adapters] == ["c-1"]


def token(value: object, name: str) -> str:
    """Returns a forged page token."""
    return base64.urlsafe_b64encode(json.dumps([["", "", "", []], value, name]).encode()).decode()


@pytest.mark.parametrize(
    ("request_", "field"),
    [
        (pb.ListAdaptersRequest(page_token="???"), "page_token"),
        (pb.ListAdaptersRequest(page_token="W10="), "page_token"),
        (pb.ListAdaptersRequest(page_token=token(1 << 70, "a")), "page_token"),
        (pb.ListAdaptersRequest(page_token=token("\ud800", "a")), "page_token"),
        (pb.ListAdaptersRequest(order_by="size"), "order_by"),
        (pb.ListAdaptersRequest(page_size=1001), "page_size"),
        (
            pb.ListAdaptersRequest(filter=pb.AdapterFilter(labels={str(i): "" for i in range(17)})),
            "filter.labels",
        ),
    ],
)
async def test_bad_lists(tmp_path: Path, request_: Any, field: str) -> None:
    async with rig(tmp_path) as toy:
        code, details = await status(toy.adapters.ListAdapters(request_))
        assert code is grpc.StatusCode.INVALID_ARGUMENT
        assert details["BadRequest"].field_violations[0].field == field


async def test_bad_aliases_name_their_field(tmp_path: Path) -> None:
    async with rig(tmp_path) as toy:
        await versions(toy)
        for alias, targets, field in [
            ("latest", [target(1)], "alias"),
            ("p", [], "targets"),
            ("p", [target(1, -1)], "targets"),
            ("p", [target(1), target(1)], "targets"),
        ]:
            request = pb.SetAliasRequest(name="a", alias=alias, targets=targets)
            code, details = await status(toy.adapters.SetAlias(request))
            assert code is grpc.StatusCode.INVALID_ARGUMENT
            assert details["BadRequest"].field_violations[0].field == field
        for name, alias, version in [("b", "p", 1), ("a", "p", 9)]:
            code, _ = await status(
                toy.adapters.SetAlias(
                    pb.SetAliasRequest(name=name, alias=alias, targets=[target(version)])
                )
            )
            assert code is grpc.StatusCode.NOT_FOUND


async def test_one_version_can_be_deleted(tmp_path: Path) -> None:
    async with rig(tmp_path) as toy:
        one, two = await versions(toy)
        gone = await toy.adapters.DeleteAdapter(pb.DeleteAdapterRequest(name="a@1"))
        assert gone.versions_deleted == 1
        got = await toy.adapters.GetAdapter(pb.GetAdapterRequest(name="a"))
        assert [version.digest for version in got.versions] == [two]
        assert (await status(toy.generate("x", adapter=one)))[0] is grpc.StatusCode.NOT_FOUND
