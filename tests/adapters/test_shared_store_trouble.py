"""A store in a bucket: damage, an unreachable bucket, and concurrent changes."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path

import pytest

from adaplex.adapters.errors import AdapterError, SourceUnavailable, StoreCorrupt
from adaplex.adapters.registry.registry import AdapterRegistry
from adaplex.adapters.storage.alias_split import Target
from adaplex.adapters.storage.bucket import Bucket, Conflict
from adaplex.adapters.storage.bucket_catalog import BucketCatalog
from adaplex.adapters.storage.bucket_content import BucketContent
from adapters.handmade import UPLOAD, files, push, records, tensors
from adapters.replicas import replica


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


def test_a_change_whose_answer_was_lost_is_made_once(
    replicas: tuple[AdapterRegistry, AdapterRegistry], monkeypatch: pytest.MonkeyPatch
) -> None:
    one, _ = replicas
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
    read, raced = BucketContent._read, []

    def racing(contents: BucketContent, wanted: str) -> object:
        found = read(contents, wanted)
        if contents is one.intake._contents and found[0] and found[0].unnamed_since and not raced:
            raced.append(wanted)
            push(two, "b")  # between the look and the deletion
        return found

    monkeypatch.setattr(BucketContent, "_read", racing)
    one.names.delete("a", UPLOAD)
    one.garbage.sweep()
    assert raced
    three = replica(s3_prefix, tmp_path / "three")
    assert three.programs.program(digest).digest == digest
    for registry in (one, two, three):
        registry.close()


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
    replicas: tuple[AdapterRegistry, AdapterRegistry], s3_prefix: str, tmp_path: Path
) -> None:
    one, two = replicas
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
    catalog._refreshed.clear()
    catalog._all_refreshed = -3600.0
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
