"""Two servers that share a store in a bucket: changes on one apply to the other."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path

import pytest

from adaplex.adapters.errors import AdapterExists, AdapterNotFound
from adaplex.adapters.registry.registry import AdapterRegistry
from adaplex.adapters.storage.alias_split import Target
from adaplex.adapters.storage.bucket import Bucket
from adapters.handmade import UPLOAD, objects, push, records
from adapters.replicas import replica


def test_an_upload_is_served_by_the_other_and_fetched_once(
    replicas: tuple[AdapterRegistry, AdapterRegistry], tmp_path: Path
) -> None:
    one, two = replicas
    done = push(one, "a")
    digest = done.record.digest
    assert objects(tmp_path / "two") == set()
    with two.resolve("a") as lease:
        assert lease.record == done.record
        assert not two.is_local(digest)
        assert two.programs.program(digest).digest == digest
        assert two.is_local(digest)
    assert two.programs.report(digest) == done.report
    assert [record.name for record in records(two)] == ["a"]


def test_a_flip_is_seen_by_both(replicas: tuple[AdapterRegistry, AdapterRegistry]) -> None:
    one, two = replicas
    digests = [push(one, "a", seed=seed, replace=True).record.digest for seed in range(2)]
    two.names.set_alias("a", "default", [Target(1)], UPLOAD)
    for registry in replicas:
        with registry.resolve("a") as lease:
            assert lease.record.digest == digests[0]
    one.names.rollback("a", "default", UPLOAD)
    for registry in replicas:
        with registry.resolve("a") as lease:
            assert lease.record.digest == digests[1]


def test_one_name_changed_by_both_at_once_loses_nothing(
    replicas: tuple[AdapterRegistry, AdapterRegistry],
) -> None:
    start = threading.Barrier(4)

    def work(worker: int) -> None:
        start.wait()
        for turn in range(5):
            push(replicas[worker % 2], "a", seed=100 * worker + turn, replace=True)

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(work, range(4)))
    entry = replicas[0].names.entry("a")
    assert [version.number for version in entry.versions] == list(range(1, 21))
    assert len({version.digest for version in entry.versions}) == 20


def test_a_taken_name_is_taken_everywhere(
    replicas: tuple[AdapterRegistry, AdapterRegistry],
) -> None:
    push(replicas[0], "a")
    with pytest.raises(AdapterExists):
        push(replicas[1], "a", seed=1)


def test_what_is_deleted_is_gone_for_both_and_collected_when_old(
    s3_prefix: str,
    tmp_path: Path,
) -> None:
    one = replica(s3_prefix, tmp_path / "one")
    two = replica(s3_prefix, tmp_path / "two", grace=timedelta(0))
    digest = push(one, "a").record.digest
    with two.resolve("a"):
        two.programs.program(digest)
        one.names.delete("a", UPLOAD)
        assert objects(tmp_path / "one") == set()
        assert two.garbage.sweep() == frozenset(), "a lease holds it here"
    with pytest.raises(AdapterNotFound):
        two.resolve("a")
    assert one.garbage.orphans() == frozenset(), "the other has collected it"
    left = [stat.key for stat in Bucket(s3_prefix).list("objects/")]
    assert left == [f"objects/{digest[7:]}/manifest.json"], "a tombstone"
    assert push(one, "again").record.digest == digest
    assert two.programs.program(digest).digest == digest
    for registry in (one, two):
        registry.close()


def test_young_content_without_a_name_is_left_alone(s3_prefix: str, tmp_path: Path) -> None:
    one = replica(s3_prefix, tmp_path / "one")
    digest = push(one, "a").record.digest
    one.names.delete("a", UPLOAD)
    assert [stat for stat in Bucket(s3_prefix).list("objects/") if digest[7:] in stat.key]
    assert push(one, "b").record.digest == digest
    assert one.programs.program(digest).digest == digest
    one.close()


def test_the_cache_keeps_to_its_budget(s3_prefix: str, tmp_path: Path) -> None:
    one = replica(s3_prefix, tmp_path / "one", cache_bytes=8000)
    digests = [push(one, f"a{i}", seed=i).record.digest for i in range(8)]
    assert 1 <= len(objects(tmp_path / "one")) < 8
    for digest in digests:
        assert one.programs.program(digest).digest == digest
    assert 1 <= len(objects(tmp_path / "one")) < 8
    one.close()


def test_a_restart_finds_everything(s3_prefix: str, tmp_path: Path) -> None:
    one = replica(s3_prefix, tmp_path / "one")
    made = [push(one, f"a{i}", seed=i).record for i in range(3)]
    one.close()
    again = replica(s3_prefix, tmp_path / "elsewhere")
    assert records(again) == made
    again.close()


def test_a_lease_elsewhere_outlives_a_delete(
    replicas: tuple[AdapterRegistry, AdapterRegistry],
) -> None:
    one, two = replicas
    digest = push(one, "a").record.digest
    with two.resolve("a"):
        one.names.delete("a", UPLOAD)
        one.garbage.sweep()
        assert two.programs.program(digest).digest == digest


def test_a_split_is_fair_while_one_side_is_elsewhere(
    replicas: tuple[AdapterRegistry, AdapterRegistry],
) -> None:
    one, two = replicas
    warm, cold = (push(one, "a", seed=s, replace=True).record.digest for s in range(2))
    two.programs.program(warm)
    one.names.set_alias("a", "default", [Target(1), Target(2)], UPLOAD)
    keys = [f"user-{i}" for i in range(200)]
    sides = []
    for key in keys:
        with two.resolve("a", routing_key=key) as lease:
            sides.append(lease.record.digest)
    drawn = []
    for _ in range(200):
        with two.resolve("a") as lease:
            drawn.append(lease.record.digest)
    assert not two.is_local(cold)
    assert 70 < sides.count(cold) < 130
    assert 70 < drawn.count(cold) < 130
