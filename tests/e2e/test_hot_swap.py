"""Adapters change under load; every answer is the one that its adapter gives alone."""

from __future__ import annotations

import asyncio
import random
from contextlib import suppress
from pathlib import Path

import pytest

from adaplex.client import AsyncClient, DeadlineExceeded, Generation, NotFound
from e2e.conftest import ModelServerRig, Serving

PACE_SECONDS = 0.01
"""Pause between two changes or two disturbances, so that they do not use up a core."""
PROMPTS = ["Once upon a time", "hello, world", "x" * 90, "The quick brown fox " * 8]
TOKENS = 8


async def answer(
    client: AsyncClient, prompt: str, adapter: str | None, mode: str | None = None
) -> Generation:
    return await client.generate(
        prompt, adapter=adapter, mode=mode, max_tokens=TOKENS, ignore_eos=True
    )


Answers = dict[tuple[str, str, int], tuple[int, ...]]
"""Token ids by (digest, mode, prompt index)."""


def key(got: Generation, index: int) -> tuple[str, str, int]:
    """Returns (digest, mode, prompt index); digest and mode are empty for the base."""
    if got.adapter is None:
        return "", "", index
    return got.adapter.digest, str(got.adapter.mode), index


async def alone(serving: Serving, adapters: list[Path], modes: tuple[str, ...]) -> Answers:
    """Returns every adapter's answer to every prompt in every mode, each generated alone."""
    expected = {}
    async with serving(prefix_cache=False, merged_bytes="4MiB") as rig:
        asked: list[tuple[str | None, str | None]] = [(None, None)]
        for i, directory in enumerate(adapters):
            await rig.client.adapters.upload(f"ref{i}", directory)
            asked.extend((f"ref{i}", mode) for mode in modes)
        for name, mode in asked:
            for index, prompt in enumerate(PROMPTS):
                got = await answer(rig.client, prompt, name, mode)
                expected[key(got, index)] = tuple(got.token_ids)
        for i in range(len(adapters)):
            await rig.client.adapters.delete(f"ref{i}")
    return expected


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"adapter_mode": "auto", "merged_bytes": "4MiB"},
        {"kv_cache_bytes": "0.75MiB", "max_model_len": 400},
    ],
    ids=["plain", "merges", "few-blocks"],
)
async def test_every_answer_under_churn_equals_its_adapters_alone(
    serving: Serving, adapters: list[Path], settings: dict[str, str]
) -> None:
    modes = ("unmerged", "merged") if "merged_bytes" in settings else ("unmerged",)
    expected = await alone(serving, adapters, modes)
    seen: set[str] = set()
    chance = random.Random(7)
    async with serving(arena_bytes="200KiB", **settings) as rig:
        for i in range(8):
            await rig.client.adapters.upload(f"steady{i}", adapters[i])
        churning = asyncio.create_task(churn(rig, adapters, random.Random(8)))
        disturbing = asyncio.create_task(disturb(rig, random.Random(9)))

        async def ask(name: str | None) -> None:
            index = chance.randrange(len(PROMPTS))
            mode = chance.choice([None, modes[-1]])  # auto's choice depends on this machine
            try:
                got = await answer(rig.client, PROMPTS[index], name, mode)
            except NotFound:
                assert name == "churned"
                return
            assert (got.adapter is None) == (name is None)
            assert tuple(got.token_ids) == expected[key(got, index)], name
            seen.add(key(got, index)[1])
            if name is not None and name.startswith("steady"):
                assert got.adapter is not None
                assert got.adapter.name == name

        for _ in range(8):
            names = [f"steady{chance.randrange(8)}" for _ in range(8)]
            await asyncio.gather(*map(ask, [*names, None, "churned", None]))
        churning.cancel()
        disturbing.cancel()
        results = await asyncio.gather(churning, disturbing, return_exceptions=True)
        assert all(isinstance(result, asyncio.CancelledError) for result in results), results
        assert seen == {"", *modes}


async def churn(rig: ModelServerRig, adapters: list[Path], chance: random.Random) -> None:
    """Uploads, replaces, unloads and deletes adapters until it is cancelled."""
    client = rig.client.adapters
    while True:
        await client.upload("churned", adapters[8 + chance.randrange(12)], replace=True)
        await client.unload(f"steady{chance.randrange(8)}")
        await asyncio.sleep(PACE_SECONDS)
        if chance.random() < 0.4:
            await client.delete("churned")


async def disturb(rig: ModelServerRig, chance: random.Random) -> None:
    """Starts requests that end early: cancelled in mid-stream, or by their deadline."""
    while True:
        adapter = chance.choice([None, "steady1", "steady5"])
        if chance.random() < 0.5:
            async with rig.client.stream("y" * 50, adapter=adapter, max_tokens=300) as stream:
                async for _ in stream:
                    if chance.random() < 0.5:
                        break
        else:
            with suppress(DeadlineExceeded):
                await rig.client.generate(
                    "z" * 200, adapter=adapter, max_tokens=300, timeout=0.05, ignore_eos=True
                )
        await asyncio.sleep(PACE_SECONDS)


async def test_running_requests_finish_on_the_old_version_of_a_replaced_name(
    serving: Serving, adapters: list[Path]
) -> None:
    expected = await alone(serving, adapters[:2], ("unmerged",))
    async with serving() as rig:
        first = await rig.client.adapters.upload("name", adapters[0])
        async with rig.client.stream(
            PROMPTS[3], adapter="name", max_tokens=TOKENS, ignore_eos=True
        ) as stream:
            async for _ in stream:
                break
            second = await rig.client.adapters.upload("name", adapters[1], replace=True)
            new = await answer(rig.client, PROMPTS[3], "name")
            async for _ in stream:
                pass
        old = stream.generation
        assert (first.adapter.version, second.adapter.version) == (1, 2)
        assert old.adapter is not None
        assert new.adapter is not None
        assert (old.adapter.digest, old.adapter.version) == (first.adapter.digest, 1)
        assert (new.adapter.digest, new.adapter.version) == (second.adapter.digest, 2)
        assert tuple(old.token_ids) == expected[first.adapter.digest, "unmerged", 3]
        assert tuple(new.token_ids) == expected[second.adapter.digest, "unmerged", 3]
        assert old.token_ids != new.token_ids
        pinned = await answer(rig.client, PROMPTS[3], "name@1")
        assert pinned.token_ids == old.token_ids


async def test_the_prefix_cache_separates_adapters_modes_and_salts(
    serving: Serving, adapters: list[Path]
) -> None:
    async with serving(merged_bytes="4MiB") as rig:
        for i in range(2):
            await rig.client.adapters.upload(f"a{i}", adapters[i])
        prompt = "a prompt of more than three blocks, " * 3

        async def cached(adapter: str | None, mode: str = "unmerged", salt: str = "") -> int:
            got = await rig.client.generate(
                prompt, adapter=adapter, mode=mode, cache_salt=salt, max_tokens=2
            )
            return got.usage.cached_tokens

        for fresh in (
            cached("a0"),
            cached("a1"),
            cached(None),
            cached("a0", "merged"),
            cached("a0", salt="t"),
        ):
            assert await fresh == 0
        for again in (
            cached("a0"),
            cached("a1"),
            cached(None),
            cached("a0", "merged"),
            cached("a0", salt="t"),
        ):
            assert await again >= 96
