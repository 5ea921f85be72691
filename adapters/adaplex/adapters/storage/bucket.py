"""Bucket: one prefix of an S3-compatible bucket, with conditional writes.

Endpoint and credentials come from AWS_* environment variables, as obstore reads them:
https://developmentseed.org/obstore. Plain http is taken only from an endpoint that says so.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import obstore
from obstore.exceptions import (
    AlreadyExistsError,
    BaseError,
    NotFoundError,
    NotModifiedError,
    PreconditionError,
)
from obstore.store import S3Store

from adaplex.adapters.errors import AdapterInvalid, AdapterTooLarge, SourceUnavailable

if TYPE_CHECKING:
    from obstore import GetOptions

URI = re.compile(r"(?i:s3)://(?P<bucket>[A-Za-z0-9][A-Za-z0-9._-]{1,62})(?P<prefix>(/[^/?#]+)*)/*")
TIMEOUT = timedelta(seconds=30)
"""Without a byte; what comes slowly but steadily may take TOTAL_TIMEOUT."""
TOTAL_TIMEOUT = timedelta(minutes=10)
RETRIES = 3
RETRY_TIMEOUT = timedelta(seconds=20)


class Conflict(Exception):
    """The condition of a write does not hold: somebody else was faster."""


@dataclass(frozen=True)
class Blob:
    """An object's bytes, and the mark of this state of it."""

    data: bytes
    etag: str


@dataclass(frozen=True)
class Stat:
    """What a listing says of an object; `key` is relative to the prefix."""

    key: str
    etag: str
    size: int
    modified: datetime


class Unchanged:
    """In place of a Blob: the object is still in the state that the caller knows."""


class Bucket:
    """Objects under `s3://bucket/prefix`. Thread-safe; calls block.

    Every method raises SourceUnavailable when the bucket cannot be reached or refuses us.
    """

    def __init__(self, uri: str) -> None:
        """Raises AdapterInvalid for what is no such URI."""
        match = URI.fullmatch(uri)
        if match is None or {".", ".."} & set(match["prefix"].split("/")):
            raise AdapterInvalid.because("uri", "must be s3://bucket/prefix")
        self.uri = f"s3://{match['bucket']}{match['prefix']}"
        endpoint = os.environ.get("AWS_ENDPOINT_URL", "")
        self._store: Any = S3Store(
            match["bucket"],
            prefix=match["prefix"].strip("/") or None,
            region=os.environ.get("AWS_REGION") or "us-east-1",
            client_options={
                "connect_timeout": TIMEOUT,
                "read_timeout": TIMEOUT,
                "timeout": TOTAL_TIMEOUT,
                "allow_http": endpoint.startswith("http://"),
            },
            retry_config={"max_retries": RETRIES, "retry_timeout": RETRY_TIMEOUT},
        )

    def get(self, key: str, *, unless_etag: str = "") -> Blob | Unchanged | None:
        """An object; None when it is not there, Unchanged when its etag is the one given."""
        options: GetOptions = {"if_none_match": unless_etag} if unless_etag else {}
        with self._reached(key):
            try:
                found = obstore.get(self._store, key, options=options)
                return Blob(bytes(found.bytes()), found.meta["e_tag"] or "")
            except NotModifiedError:
                return Unchanged()
            except (NotFoundError, FileNotFoundError):
                return None

    def download(self, key: str, path: Path, *, max_bytes: int, if_etag: str = "") -> int | None:
        """Writes an object to a file; its bytes, or None when it is not there.

        Raises AdapterTooLarge before it writes more than `max_bytes`, and SourceUnavailable when
        the object is no longer in the state `if_etag`.
        """
        options: GetOptions = {"if_match": if_etag} if if_etag else {}
        with self._reached(key):
            try:
                found = obstore.get(self._store, key, options=options)
            except (NotFoundError, FileNotFoundError):
                return None
            if found.meta["size"] > max_bytes:
                size = found.meta["size"]
                raise AdapterTooLarge(
                    f"{key} has {size} bytes, the limit is {max_bytes}", field="uri"
                )
            with path.open("wb") as file:
                for chunk in found.stream(min_chunk_size=1024 * 1024):
                    file.write(chunk)
            return int(found.meta["size"])

    def put(
        self, key: str, data: bytes | Path, *, if_absent: bool = False, if_etag: str = ""
    ) -> str:
        """Writes an object whole; its etag. Raises Conflict when it is there although it must be
        absent, or is not in the state `if_etag`.
        """
        mode: Any = "create" if if_absent else {"e_tag": if_etag} if if_etag else "overwrite"
        plain = mode != "overwrite"  # conditions hold for a single request only
        with self._reached(key):
            try:
                done = obstore.put(
                    self._store, key, data, mode=mode, use_multipart=False if plain else None
                )
            except (AlreadyExistsError, PreconditionError, NotFoundError, FileNotFoundError):
                raise Conflict(key) from None
            return done["e_tag"] or ""

    def list(self, prefix: str = "") -> Iterator[Stat]:
        """Every object under a key prefix that ends with a slash, or all."""
        with self._reached(prefix):
            for page in obstore.list(self._store, prefix or None, chunk_size=1000):
                for meta in page:
                    yield Stat(
                        meta["path"], meta["e_tag"] or "", meta["size"], meta["last_modified"]
                    )

    def delete(self, *keys: str) -> None:
        """Removes objects; one that is not there is no error."""
        with self._reached(", ".join(keys)):
            for key in keys:
                try:
                    obstore.delete(self._store, key)
                except (NotFoundError, FileNotFoundError):
                    continue

    @contextmanager
    def _reached(self, key: str) -> Iterator[None]:
        """Says that the bucket could not be asked, without what its answer holds."""
        try:
            yield
        except BaseError as error:
            kind = type(error).__name__.removesuffix("Error")
            raise SourceUnavailable(f"{self.uri}: cannot reach {key}: {kind}") from error
