"""Objects and conditional writes in a bucket of a real S3 server."""

from __future__ import annotations

from pathlib import Path

import pytest

from adaplex.adapters.errors import AdapterInvalid, AdapterTooLarge, SourceUnavailable
from adaplex.adapters.storage.bucket import Blob, Bucket, Conflict, Unchanged


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
    monkeypatch.setattr("adaplex.adapters.storage.bucket.RETRIES", 0)
    with pytest.raises(SourceUnavailable) as caught:
        Bucket("s3://bucket/prefix").get("key")
    assert "secret-word" not in str(caught.value)
