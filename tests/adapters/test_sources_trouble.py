"""Sources that hang, send wrong bytes or change while read, and malformed URIs."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from adaplex.adapters.checkpoint import CONFIG, WEIGHTS
from adaplex.adapters.errors import AdapterInvalid, SourceUnavailable
from adaplex.adapters.sources.sources import Sources
from adaplex.adapters.storage.bucket import Bucket
from adapters.handmade import files, make_sources, tensors
from adapters.hub_server import Hub, serving

Answer = tuple[int, dict[str, str], bytes]


def from_anywhere(**options: Any) -> Sources:
    return make_sources(hub_allow=("*/*",), **options)


@contextmanager
def asked(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    with serving(hub):
        monkeypatch.setenv("HF_ENDPOINT", hub.url)
        hub.commit("main", files())
        yield hub


# The hub.


class HangingHub(Hub):
    """Answers requests whose path has `hang_at` in it only once `over` is set."""

    hang_at: str
    over: threading.Event

    def answer(self, path: str) -> Answer:
        if self.hang_at in path:
            self.over.wait()
        return super().answer(path)


@pytest.mark.timeout(30)
@pytest.mark.parametrize("hang_at", ["/api/models/", "/resolve/"])
def test_a_hub_that_hangs_is_given_up(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, hang_at: str
) -> None:
    monkeypatch.setattr("adaplex.adapters.sources.hub.TIMEOUT_SECONDS", 0.2)
    hub = HangingHub()
    hub.hang_at, hub.over = hang_at, threading.Event()
    with asked(hub, monkeypatch):
        try:
            with pytest.raises(SourceUnavailable):
                from_anywhere().fetch("hf://org/tone", tmp_path)
        finally:
            hub.over.set()


class LyingHub(Hub):
    """Answers every request with one body."""

    body: bytes

    def answer(self, path: str) -> Answer:
        return 200, {}, self.body


@pytest.mark.parametrize(
    "body",
    [
        b"<html>log in",
        b"[]",
        b'{"sha": 5}',
        b"\xff",
        b'{"id": "a/b", "sha": 5}',
        b'{"id": "a/b", "siblings": [1]}',
    ],
)
def test_an_answer_that_is_not_the_hubs(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, body: bytes
) -> None:
    hub = LyingHub()
    hub.body = body
    with asked(hub, monkeypatch), pytest.raises(SourceUnavailable):
        from_anywhere().fetch("hf://org/tone", tmp_path)


class TokenlessHub(Hub):
    """Redirects file requests to another origin."""

    elsewhere: str

    def answer(self, path: str) -> Answer:
        if "/resolve/" in path:
            return 302, {"Location": self.elsewhere + path}, b""
        return super().answer(path)


def test_the_token_stays_with_the_hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    tokens: list[str | None] = []

    def give(handler: BaseHTTPRequestHandler) -> None:
        tokens.append(handler.headers["Authorization"])
        send(handler, files()[handler.path.rpartition("/")[2]])

    monkeypatch.setenv("HF_TOKEN", "hf_word")
    hub = TokenlessHub()
    with answering(give) as hub.elsewhere, asked(hub, monkeypatch):
        from_anywhere().fetch("hf://org/tone", tmp_path)
    assert tokens == [None, None]


@pytest.mark.parametrize("name", ["a--b", "a..b", "tone.git", "tone-", "tone."])
def test_names_that_no_repository_has(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, name: str
) -> None:
    with asked(Hub(), monkeypatch) as hub:
        with pytest.raises(AdapterInvalid) as caught:
            from_anywhere().fetch(f"hf://org/{name}", tmp_path)
        assert caught.value.field == "uri"
        assert from_anywhere(resolve_templates=("hf://org/{name}",)).find(name, tmp_path) is None
        assert hub.requests == []


# Buckets.


@pytest.mark.parametrize(
    "uri",
    [
        "s3://[x/p",
        "s3://a b/p",
        "s3://bucket:80/p",
        "s3://bucket/a//b",
        "s3://bucket/./a",
        "s3://bucket/a/../b",
        "s3://bucket/a?versionId=3",
        "s3://bucket/a?X-Amz-Signature=word",
        "s3://bucket/a#b",
        "s3://key:word@bucket/a",
    ],
)
def test_bucket_uris_that_are_refused(tmp_path: Path, uri: str) -> None:
    with pytest.raises(AdapterInvalid) as caught:
        from_anywhere(bucket_allow=("s3://bucket",)).fetch(uri, tmp_path)
    assert caught.value.field == "uri"
    assert "word" not in str(caught.value)


def test_files_that_change_while_they_are_read_are_not_mixed(
    s3_prefix: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bucket = Bucket(s3_prefix)
    for name, data in files().items():
        bucket.put(name, data)
    download = Bucket.download

    def overtaken(self: Bucket, key: str, path: Path, **options: Any) -> int | None:
        if key == WEIGHTS:
            bucket.put(WEIGHTS, files(weights=tensors(seed=1))[WEIGHTS])
        return download(self, key, path, **options)

    monkeypatch.setattr(Bucket, "download", overtaken)
    with pytest.raises(SourceUnavailable, match=WEIGHTS):
        from_anywhere(bucket_allow=(s3_prefix,)).fetch(s3_prefix, tmp_path)
    monkeypatch.undo()


def test_a_listing_has_an_end(
    s3_prefix: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("adaplex.adapters.sources.object_store.MAX_LISTED", 3)
    bucket = Bucket(s3_prefix)
    for name, data in (files() | {"checkpoint-1/a": b"1"}).items():
        bucket.put(name, data)
    allowed = from_anywhere(bucket_allow=(s3_prefix,))
    allowed.fetch(s3_prefix, tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {CONFIG, WEIGHTS}
    bucket.put("checkpoint-1/b", b"2")
    with pytest.raises(AdapterInvalid, match="more than 3 objects"):
        allowed.fetch(s3_prefix, tmp_path)


SIZE = 20


def test_what_comes_slowly_is_waited_for(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    never = threading.Event()

    def drip(handler: BaseHTTPRequestHandler) -> None:
        send(handler, b"", size=SIZE)
        for _ in range(SIZE):  # twice the timeout in all
            handler.wfile.write(b"x")
            never.wait(0.1)

    monkeypatch.setattr("adaplex.adapters.storage.bucket.TIMEOUT", timedelta(seconds=1))
    monkeypatch.setattr("adaplex.adapters.storage.bucket.RETRIES", 0)
    with pretending_s3(drip, monkeypatch):
        assert Bucket("s3://bucket").download("a", tmp_path / "a", max_bytes=SIZE) == SIZE
    assert (tmp_path / "a").read_bytes() == b"x" * SIZE


@pytest.mark.timeout(30)
def test_what_stops_coming_is_given_up(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    over = threading.Event()

    def stall(handler: BaseHTTPRequestHandler) -> None:
        send(handler, b"x", size=SIZE)
        over.wait()

    monkeypatch.setattr("adaplex.adapters.storage.bucket.TIMEOUT", timedelta(seconds=0.2))
    monkeypatch.setattr("adaplex.adapters.storage.bucket.RETRIES", 0)
    with pretending_s3(stall, monkeypatch):
        try:
            with pytest.raises(SourceUnavailable):
                Bucket("s3://bucket").download("a", tmp_path / "a", max_bytes=SIZE)
        finally:
            over.set()


# Servers.


def send(handler: BaseHTTPRequestHandler, body: bytes, *, size: int | None = None) -> None:
    """Sends a valid response's head for `size` bytes, then `body`, which may be shorter."""
    handler.send_response(200)
    handler.send_header("Content-Length", str(len(body) if size is None else size))
    handler.send_header("ETag", '"e"')
    handler.send_header("Last-Modified", "Thu, 01 Jan 2026 00:00:00 GMT")
    handler.end_headers()
    handler.wfile.write(body)
    handler.wfile.flush()


@contextmanager
def answering(answer: Any) -> Iterator[str]:
    """Yields the URL of a server that handles every GET with `answer`."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            answer(self)

        def log_message(self, *_: Any) -> None: ...

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


@contextmanager
def pretending_s3(answer: Any, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    with answering(answer) as url:
        monkeypatch.setenv("AWS_ENDPOINT_URL", url)
        monkeypatch.setenv("AWS_ACCESS_KEY_ID", "somebody")
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "word")
        yield
