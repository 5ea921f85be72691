"""Bucket: one prefix of an S3-compatible bucket, with conditional writes.

obstore reads the endpoint and credentials from AWS_* environment variables:
https://developmentseed.org/obstore. Plain http is allowed only if AWS_ENDPOINT_URL has it.
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
"""Longest time without a byte."""
TOTAL_TIMEOUT = timedelta(minutes=10)
"""Longest time of one request."""
RETRIES = 3
RETRY_TIMEOUT = timedelta(seconds=20)


class Conflict(Exception):
    """The condition of a write does not hold: another client has changed the object."""


@dataclass(frozen=True)
class Blob:
    """An object's bytes, and the etag of this state of it."""

    data: bytes
    etag: str


@dataclass(frozen=True)
class Stat:
    """An object as a listing shows it; `key` is relative to the prefix, `size` in bytes."""

    key: str
    etag: str
    size: int
    modified: datetime


class Unchanged:
    """Result of `get` in place of a Blob: the object still has the etag that the caller gave."""


class Bucket:
    """Objects under `s3://bucket/prefix`. Thread-safe; calls block.

    Every method raises SourceUnavailable if the bucket cannot be reached or refuses the request.
    """

    def __init__(self, uri: str) -> None:
        """Raises AdapterInvalid for an invalid URI."""
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
        """Returns an object, None if it is absent, Unchanged if it still has `unless_etag`."""
        options: GetOptions = {"if_none_match": unless_etag} if unless_etag else {}
        with self._unavailable_as_ours(key):
            try:
                found = obstore.get(self._store, key, options=options)
                return Blob(bytes(found.bytes()), found.meta["e_tag"] or "")
            except NotModifiedError:
                return Unchanged()
            except (NotFoundError, FileNotFoundError):
                return None

    def download(self, key: str, path: Path, *, max_bytes: int, if_etag: str = "") -> int | None:
        """Writes an object to a file. Returns its size in bytes, None if it is absent.

        Raises AdapterTooLarge before it writes more than `max_bytes`, and SourceUnavailable if the
        object no longer has the etag `if_etag`.
        """
        options: GetOptions = {"if_match": if_etag} if if_etag else {}
        with self._unavailable_as_ours(key):
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
        """Writes an object atomically. Returns its new etag.

        Raises Conflict if the object exists despite `if_absent`, or does not have `if_etag`.
        """
        mode: Any = "create" if if_absent else {"e_tag": if_etag} if if_etag else "overwrite"
        plain = mode != "overwrite"  # a condition covers a single request only
        with self._unavailable_as_ours(key):
            try:
                done = obstore.put(
                    self._store, key, data, mode=mode, use_multipart=False if plain else None
                )
            except (AlreadyExistsError, PreconditionError, NotFoundError, FileNotFoundError):
                raise Conflict(key) from None
            return done["e_tag"] or ""

    def list(self, prefix: str = "") -> Iterator[Stat]:
        """Yields the objects under a key prefix that ends with a slash, or all."""
        with self._unavailable_as_ours(prefix):
            for page in obstore.list(self._store, prefix or None, chunk_size=1000):
                for meta in page:
                    yield Stat(
                        meta["path"], meta["e_tag"] or "", meta["size"], meta["last_modified"]
                    )

    def delete(self, *keys: str) -> None:
        """Removes objects. Absent ones are ignored."""
        with self._unavailable_as_ours(", ".join(keys)):
            for key in keys:
                try:
                    obstore.delete(self._store, key)
                except (NotFoundError, FileNotFoundError):
                    continue

    @contextmanager
    def _unavailable_as_ours(self, key: str) -> Iterator[None]:
        """Raises SourceUnavailable for errors of obstore, without their text, which callers see."""
        try:
            yield
        except BaseError as error:
            kind = type(error).__name__.removesuffix("Error")
            raise SourceUnavailable(f"{self.uri}: cannot reach {key}: {kind}") from error
