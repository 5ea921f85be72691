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
    AdapterError,
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
    keys = [stat.key for stat in bucket.list(f"objects/{hexes}/")]
    bucket.put(next(key for key in keys if key.endswith("adapter_config.json")), b"{}")
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


def test_a_change_whose_answer_was_lost_is_made_once(
    pair: tuple[AdapterRegistry, AdapterRegistry], monkeypatch: pytest.MonkeyPatch
) -> None:
    one, _ = pair
    for seed in range(2):
        push(one, "a", seed=seed, replace=True)
    one.names.set_alias("a", "default", [Target(2)], UPLOAD)
    one.names.set_alias("a", "default", [Target(1)], UPLOAD)
    put, lost = Bucket.put, []

    def losing(bucket: Bucket, key: str, data: bytes, **condition: object) -> str:
        etag = put(bucket, key, data, **condition)  # type: ignore[arg-type]
        if key == "names/a.json" and not lost:
            lost.append(key)
            raise Conflict(key)  # what a retry of a write that was done is answered with
        return etag

    monkeypatch.setattr(Bucket, "put", losing)
    entry = one.names.rollback("a", "default", UPLOAD)
    assert lost
    assert [target.version for target in entry.aliases["default"]] == [2]
    assert len([e for e in entry.history if e.kind == "alias"]) == 3
    lost.clear()
    assert one.names.delete("a", UPLOAD).versions == 2


def test_an_upload_beats_the_collection_of_the_same_content(
    s3_prefix: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = replica(s3_prefix, tmp_path / "one", grace=timedelta(0))
    two = replica(s3_prefix, tmp_path / "two")
    digest = push(one, "a").record.digest
    read, raced = BucketContents._read, []

    def racing(contents: BucketContents, wanted: str) -> object:
        found = read(contents, wanted)
        if contents is one.intake._contents and found[0] and found[0].unnamed_since and not raced:
            raced.append(wanted)
            push(two, "b")  # between the look and the deletion
        return found

    monkeypatch.setattr(BucketContents, "_read", racing)
    one.names.delete("a", UPLOAD)
    one.garbage.sweep()
    assert raced
    three = replica(s3_prefix, tmp_path / "three")
    assert three.programs.program(digest).digest == digest
    for registry in (one, two, three):
        registry.close()


def test_a_lease_elsewhere_outlives_a_delete(
    pair: tuple[AdapterRegistry, AdapterRegistry],
) -> None:
    one, two = pair
    digest = push(one, "a").record.digest
    with two.resolve("a"):
        one.names.delete("a", UPLOAD)
        one.garbage.sweep()
        assert two.programs.program(digest).digest == digest


def test_a_small_cache_does_not_lose_what_is_being_read(s3_prefix: str, tmp_path: Path) -> None:
    one = replica(s3_prefix, tmp_path / "one", cache_bytes=1)
    digests = [push(one, f"a{i}", seed=i).record.digest for i in range(4)]

    def read(worker: int) -> None:
        for turn in range(12):
            wanted = (worker + turn) % 4
            with one.resolve(f"a{wanted}") as lease:
                assert one.programs.program(lease.record.digest).digest == digests[wanted]

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(read, range(4)))
    one.close()


def test_the_same_content_uploaded_by_many_at_once(s3_prefix: str, tmp_path: Path) -> None:
    one = replica(s3_prefix, tmp_path / "one")
    for turn in range(5):
        contents = files(weights=tensors(seed=turn))
        with ThreadPoolExecutor(4) as pool:
            done = list(pool.map(lambda i, c=contents, t=turn: push(one, f"n{t}-{i}", c), range(4)))
        assert len({committed.record.digest for committed in done}) == 1
    one.close()


def test_an_entry_that_cannot_be_read_hurts_nobody_else(
    pair: tuple[AdapterRegistry, AdapterRegistry], s3_prefix: str, tmp_path: Path
) -> None:
    one, two = pair
    push(one, "a")
    Bucket(s3_prefix).put("names/z.json", b'{"name": "z", "history": [{"kind": "newer"}]}')
    assert [record.name for record in records(two)] == ["a"]
    two.resolve("a").release()
    push(two, "b", seed=1)
    with pytest.raises(AdapterError, match="cannot be read"):
        two.resolve("z")
    replica(s3_prefix, tmp_path / "three").close()
    Bucket(s3_prefix).delete("names/z.json")


def test_a_bucket_that_is_away_is_asked_once_an_interval(
    s3_prefix: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = replica(s3_prefix, tmp_path / "one", refresh_seconds=3600)
    push(one, "a")
    catalog = one.names._catalog
    assert isinstance(catalog, BucketCatalog)
    catalog._looked.clear()
    catalog._listed = 0.0
    asked = []

    def away(_bucket: Bucket, key: str = "", **_options: object) -> None:
        asked.append(key)
        raise SourceUnavailable("away")

    monkeypatch.setattr(Bucket, "get", away)
    monkeypatch.setattr(Bucket, "list", away)
    for _ in range(5):
        one.resolve("a").release()
        one.names.usage()
    assert asked == ["names/a.json", "names/"]
    monkeypatch.undo()
    one.close()


def test_a_split_is_fair_while_one_side_is_elsewhere(
    pair: tuple[AdapterRegistry, AdapterRegistry],
) -> None:
    one, two = pair
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
