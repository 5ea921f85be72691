"""Sources: fetches the files of an adapter by URI, or by name from templates."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from adaplex.adapters.checkpoint import WEIGHTS, weights_in
from adaplex.adapters.errors import AdapterInvalid, AdapterNotFound
from adaplex.adapters.limits import AdapterLimits
from adaplex.adapters.sources.directory import DirectorySource
from adaplex.adapters.sources.hub import HubSource
from adaplex.adapters.sources.object_store import BucketSource
from adaplex.adapters.sources.transfer import GGUF
from adaplex.adapters.storage.selector import NAME

MAX_URI = 2048
"""Characters."""
FORGET_SECONDS = 10.0
"""Time for which a name that no template has is not looked for again."""
MAX_MISSING = 10_000
"""Names that no template had, and that are remembered."""

Convert = Callable[[Path, Path], None]
"""Converts a GGUF file to an adapter directory, the second argument."""


@dataclass(frozen=True)
class Fetched:
    """A folder with an adapter's files, and the URI that identifies exactly this content."""

    directory: Path
    uri: str


class Source(Protocol):
    """Fetches adapters of one URI scheme."""

    def fetch(self, uri: str, into: Path) -> str:
        """Writes an adapter's files into an empty folder. Returns the resolved URI."""
        ...


class Sources:
    """Fetches by scheme. Thread-safe; calls block."""

    def __init__(
        self,
        *,
        roots: Sequence[Path],
        limits: AdapterLimits,
        hub_allow: Sequence[str] = (),
        bucket_allow: Sequence[str] = (),
        resolve_templates: Sequence[str] = (),
        convert: Convert | None = None,
    ) -> None:
        """`roots`, `hub_allow` and `bucket_allow` are the places that callers may name in a URI.

        `resolve_templates` has URIs with `{name}` for `find`. The operator sets them, so they may
        be anywhere. Raises AdapterInvalid for an invalid one.
        """
        self._convert, self._templates = convert, tuple(resolve_templates)
        self._allowed = _schemes(roots, hub_allow, bucket_allow, limits)
        self._trusted = _schemes((Path("/"),), ("*/*",), ("s3:/",), limits)
        self._missing: dict[str, float] = {}
        for template in self._templates:
            if "{name}" not in template or _scheme(template) not in self._trusted:
                raise AdapterInvalid.because(
                    "resolve_from",
                    f"{template!r:.200} must be an absolute path or URI with {{name}} in it",
                )

    def fetch(self, uri: str, into: Path) -> Fetched:
        """Fetches the adapter at a URI into an empty folder.

        Raises AdapterInvalid, AdapterNotFound or AdapterTooLarge, naming `uri`, or
        SourceUnavailable.
        """
        return self._fetch(self._allowed, uri, into)

    def find(self, name: str, into: Path) -> Fetched | None:
        """Fetches a name from the first template that has it. Returns None if none has."""
        assert NAME.fullmatch(name)
        if time.monotonic() < self._missing.get(name, 0.0):
            return None
        for template in self._templates:
            try:
                return self._fetch(self._trusted, template.replace("{name}", name), into)
            except AdapterNotFound:
                continue
            except AdapterInvalid as error:
                if error.field != "uri":  # found, but not a valid adapter
                    raise
        self._remember(name)
        return None

    def _fetch(self, schemes: dict[str, Source], uri: str, into: Path) -> Fetched:
        if len(uri) > MAX_URI or not uri.isprintable():
            raise AdapterInvalid.because(
                "uri", f"must be an absolute path or URI of at most {MAX_URI} printable characters"
            )
        source = schemes.get(_scheme(uri))
        if source is None:
            served = ", ".join(f"{scheme}://" for scheme in schemes if scheme)
            raise AdapterInvalid.because("uri", f"must be an absolute path, or one of {served}")
        fetched = source.fetch(uri, into)
        for file in into.glob(f"*{GGUF}"):
            if self._convert is None:
                raise AdapterInvalid.because(
                    "uri", "is a GGUF file, which this server does not convert"
                )
            self._convert(file, into)
            file.unlink()
        if (weights := weights_in(into)).exists():
            weights.rename(into / WEIGHTS)
        return Fetched(into, fetched)

    def _remember(self, name: str) -> None:
        if len(self._missing) >= MAX_MISSING:
            self._missing.clear()
        if self._templates:
            self._missing[name] = time.monotonic() + FORGET_SECONDS


def _schemes(
    roots: Sequence[Path],
    hub_allow: Sequence[str],
    bucket_allow: Sequence[str],
    limits: AdapterLimits,
) -> dict[str, Source]:
    directory = DirectorySource(roots, limits)
    return {
        "": directory,
        "file": directory,
        "hf": HubSource(hub_allow, limits),
        "s3": BucketSource(bucket_allow, limits),
    }


def _scheme(uri: str) -> str:
    """Returns the scheme in lower case; empty for a path."""
    match = re.match(r"([A-Za-z][A-Za-z0-9+.-]*)://", uri)
    return match[1].lower() if match else ""
