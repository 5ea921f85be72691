"""A shared store on a real S3 server: conditional writes, two servers, lazy fetches, collection."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path

import pytest

from adaplex.adapters.bucket import Blob, Bucket, Conflict, Unchanged
from adaplex.adapters.bucket_catalog import BucketCatalog
from adaplex.adapters.bucket_contents import GRACE, BucketContents
from adaplex.adapters.errors import (
    AdapterExists,
    AdapterInvalid,
    AdapterNotFound,
    AdapterTooLarge,
    SourceUnavailable,
    StoreCorrupt,
)
from adaplex.adapters.intake import Room
from adaplex.adapters.limits import AdapterLimits
from adaplex.adapters.registry import AdapterRegistry
from adaplex.adapters.split import Target
from adaplex.adapters.sqlite_catalog import SqliteCatalog
from adaplex.adapters.store import AdapterStore
from adapters.handmade import BASE, UPLOAD, files, objects, push, records, tensors


def replica(
    uri: str,
    root: Path,
    *,
    cache_bytes: int = 1 << 30,
    grace: timedelta = GRACE,
    refresh_seconds: float = 0.0,
) -> AdapterRegistry:
    """One server's view of the bucket."""
    root.mkdir(parents=True, exist_ok=True)
    bucket = Bucket(uri)
    mirror = SqliteCatalog(root / "catalog.sqlite3")
    return AdapterRegistry(
        BucketContents(bucket, AdapterStore(root), cache_bytes=cache_bytes, grace=grace),
        BucketCatalog(bucket, mirror, refresh_seconds=refresh_seconds),
        BASE,
        room=Room(4, AdapterLimits()),
    )


@pytest.fixture
def pair(s3_prefix: str, tmp_path: Path) -> Iterator[tuple[AdapterRegistry, AdapterRegistry]]:
    made = replica(s3_prefix, tmp_path / "one"), replica(s3_prefix, tmp_path / "two")
    yield made
    for registry in made:
        registry.check_integrity()
        registry.close()


def test_objects_and_conditions(s3_prefix: str, tmp_path: Path) -> None:
    bucket = Bucket(s3_prefix)
    assert bucket.get("a") is None
    etag = bucket.put("a", b"1", if_absent=True)
    with pytest.raises(Conflict):
        bucket.put("a", b"2", if_absent=True)
    found = bucket.get("a")
    assert found == Blob(b"1", etag)
    assert isinstance(bucket.get("a", unless_etag=etag), Unchanged)
    second = bucket.put("a", b"2", if_etag=etag)
    with pytest.raises(Conflict):
        bucket.put("a", b"3", if_etag=etag)
    with pytest.raises(Conflict):
        bucket.put("b", b"3", if_etag=etag)
    assert bucket.get("a", unless_etag=etag) == Blob(b"2", second)
    (tmp_path / "file").write_bytes(b"x" * 3_000_000)
    bucket.put("folder/b", tmp_path / "file")
    assert {stat.key: stat.size for stat in bucket.list()} == {"a": 1, "folder/b": 3_000_000}
    assert [stat.key for stat in bucket.list("folder/")] == ["folder/b"]
    assert bucket.download("folder/b", tmp_path / "got", max_bytes=3_000_000) == 3_000_000
    assert (tmp_path / "got").read_bytes() == b"x" * 3_000_000
    assert bucket.download("nothing", tmp_path / "none", max_bytes=9) is None
    with pytest.raises(AdapterTooLarge):
        bucket.download("folder/b", tmp_path / "more", max_bytes=2_999_999)
    bucket.delete("a", "folder/b", "nothing")
    assert list(bucket.list()) == []


@pytest.mark.parametrize("uri", ["s3://", "http://b/p", "s3://key:secret@bucket/p", "bucket"])
def test_what_is_no_bucket(uri: str) -> None:
    with pytest.raises(AdapterInvalid) as caught:
        Bucket(uri)
    assert "secret" not in str(caught.value)


def test_a_bucket_that_cannot_be_reached(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "somebody")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret-word")
    monkeypatch.setattr("adaplex.adapters.bucket.RETRIES", 0)
    with pytest.raises(SourceUnavailable) as caught:
        Bucket("s3://bucket/prefix").get("key")
    assert "secret-word" not in str(caught.value)


def test_an_upload_is_served_by_the_other_and_fetched_once(
    pair: tuple[AdapterRegistry, AdapterRegistry], tmp_path: Path
) -> None:
    one, two = pair
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


def test_a_flip_is_seen_by_both(pair: tuple[AdapterRegistry, AdapterRegistry]) -> None:
    one, two = pair
    digests = [push(one, "a", seed=seed, replace=True).record.digest for seed in range(2)]
    two.names.set_alias("a", "default", [Target(1)], UPLOAD)
    for registry in pair:
        with registry.resolve("a") as lease:
            assert lease.record.digest == digests[0]
    one.names.rollback("a", "default", UPLOAD)
    for registry in pair:
        with registry.resolve("a") as lease:
            assert lease.record.digest == digests[1]


def test_one_name_changed_by_both_at_once_loses_nothing(
    pair: tuple[AdapterRegistry, AdapterRegistry],
) -> None:
    start = threading.Barrier(4)

    def work(worker: int) -> None:
        start.wait()
        for turn in range(5):
            push(pair[worker % 2], "a", seed=100 * worker + turn, replace=True)

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(work, range(4)))
    entry = pair[0].names.entry("a")
    assert [version.number for version in entry.versions] == list(range(1, 21))
    assert len({version.digest for version in entry.versions}) == 20


def test_a_taken_name_is_taken_everywhere(pair: tuple[AdapterRegistry, AdapterRegistry]) -> None:
    push(pair[0], "a")
    with pytest.raises(AdapterExists):
        push(pair[1], "a", seed=1)


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
    assert list(Bucket(s3_prefix).list("objects/")) == []
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


def test_a_damaged_cache_is_fetched_anew_and_a_damaged_bucket_is_told(
    s3_prefix: str,
    tmp_path: Path,
) -> None:
    one = replica(s3_prefix, tmp_path / "one")
    digest = push(one, "a").record.digest
    hexes = digest.removeprefix("sha256:")
    path = tmp_path / "one" / "objects" / hexes / "adapter_config.json"
    path.write_text("{}")
    assert one.programs.program(digest).digest == digest
    path.write_text("{}")
    bucket = Bucket(s3_prefix)
    bucket.put(f"objects/{hexes}/adapter_config.json", b"{}")
    with pytest.raises(StoreCorrupt):
        one.programs.program(digest)
    assert not push(one, "a").created
    assert one.programs.program(digest).digest == digest
    two = replica(s3_prefix, tmp_path / "two")
    assert two.programs.program(digest).digest == digest
    for registry in (one, two):
        registry.close()


def test_what_is_known_is_served_while_the_bucket_is_away(
    s3_prefix: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    one = replica(s3_prefix, tmp_path / "one")
    digest = push(one, "a").record.digest

    def away(*_args: object, **_options: object) -> None:
        raise SourceUnavailable("away")

    for method in ("get", "list", "put", "download"):
        monkeypatch.setattr(Bucket, method, away)
    with one.resolve("a") as lease:
        assert lease.record.digest == digest
        assert one.programs.program(digest).digest == digest
    with pytest.raises(SourceUnavailable):
        one.resolve("unknown")
    with pytest.raises(SourceUnavailable):
        push(one, "b", files(weights=tensors(seed=3)))
    monkeypatch.undo()
    one.close()


def test_a_restart_finds_everything(s3_prefix: str, tmp_path: Path) -> None:
    one = replica(s3_prefix, tmp_path / "one")
    made = [push(one, f"a{i}", seed=i).record for i in range(3)]
    one.close()
    again = replica(s3_prefix, tmp_path / "elsewhere")
    assert records(again) == made
    again.close()
