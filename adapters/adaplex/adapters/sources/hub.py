"""HubSource: the Hugging Face hub, hf://org/repo[/folder][@revision].

The revision is resolved to a commit before any file is read. API:
https://huggingface.co/docs/huggingface_hub. The endpoint is HF_ENDPOINT, the token HF_TOKEN.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any
from urllib.parse import quote

from adaplex.adapters.durable_files import NO_SPACE, file_sha256
from adaplex.adapters.errors import (
    AdapterInvalid,
    AdapterNotFound,
    SourceUnavailable,
    listed,
)
from adaplex.adapters.limits import AdapterLimits
from adaplex.adapters.sources.transfer import choose_files

PART = r"[A-Za-z0-9][A-Za-z0-9._-]{0,95}"
URI = re.compile(
    rf"hf://(?P<repo>{PART}/{PART})(?P<folder>(/{PART})*)(@(?P<revision>[A-Za-z0-9][\w./-]{{0,127}}))?"
)
TIMEOUT_SECONDS = 30.0


@dataclass(frozen=True)
class HubFile:
    """A file of a repository at a commit, with the hashes that the hub lists; `size` in bytes."""

    path: str
    size: int
    git_sha1: str
    sha256: str
    """Hash of a file outside git (LFS); empty for other files."""


class HubSource:
    """Downloads adapters from repositories."""

    def __init__(self, allow: Sequence[str], limits: AdapterLimits) -> None:
        """`allow` has patterns of `org/repo`, such as `my-org/*`."""
        self._allow, self._limits = tuple(allow), limits

    def fetch(self, uri: str, into: Path) -> str:
        """Downloads an adapter. Returns its URI with the commit in place of the revision.

        Raises AdapterInvalid, AdapterNotFound, AdapterTooLarge or SourceUnavailable.
        """
        match = URI.fullmatch(uri)
        if match is None:
            raise AdapterInvalid.because("uri", "must be hf://org/repo[/folder][@revision]")
        repo, folder = match["repo"], match["folder"].strip("/")
        if not any(fnmatchcase(repo, pattern) for pattern in self._allow):
            raise AdapterInvalid.because(
                "uri", f"{repo} must match one of --hub-allow: {listed(self._allow)}"
            )
        with _hub_errors_as_ours(repo):
            commit, files = _listing(repo, folder, match["revision"])
            sizes = {name: file.size for name, file in files.items()}
            for name in choose_files(sizes, self._limits):
                _download(repo, commit, files[name], into / name)
        return f"hf://{repo}{match['folder']}@{commit}"


def _listing(repo: str, folder: str, revision: str | None) -> tuple[str, dict[str, HubFile]]:
    """Returns the commit of a revision, and the files directly in the folder there, by name.

    Makes a single request with a timeout; the hub library's listing of a folder has no timeout.
    """
    info = _info(repo, revision)
    if not re.fullmatch(r"[0-9a-f]{40}", str(info.sha)):
        raise SourceUnavailable(f"the hub returned no commit of {repo}")
    files = {}
    for found in info.siblings or ():
        parent, _, name = found.rfilename.rpartition("/")
        if parent == folder and found.size is not None and found.blob_id:
            sha256 = found.lfs.sha256 if found.lfs else ""
            files[name] = HubFile(found.rfilename, found.size, found.blob_id, sha256)
    return info.sha, files


def _info(repo: str, revision: str | None) -> Any:
    """Returns the hub's ModelInfo. Raises SourceUnavailable for an answer that is not one."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HFValidationError

    try:
        return HfApi(endpoint=_endpoint()).model_info(
            repo, revision=revision, files_metadata=True, timeout=TIMEOUT_SECONDS
        )
    except HFValidationError:
        raise AdapterInvalid.because("uri", f"{repo} is not a valid repository name") from None
    except (ValueError, TypeError, KeyError, AttributeError) as error:  # not the hub's JSON
        raise SourceUnavailable(f"the hub's answer about {repo} cannot be read") from error


def _download(repo: str, commit: str, file: HubFile, target: Path) -> None:
    """Writes one file, and compares its size and hash with the listing."""
    from huggingface_hub import utils as hub

    headers = hub.build_hf_headers()  # type: ignore[attr-defined]
    url = f"{_endpoint()}/{repo}/resolve/{commit}/{quote(file.path)}"
    written = 0
    with (
        hub.get_session().stream(  # type: ignore[attr-defined]
            "GET", url, headers=headers, follow_redirects=True, timeout=TIMEOUT_SECONDS
        ) as response,
        target.open("wb") as output,
    ):
        if response.status_code == 404:
            raise AdapterNotFound(f"{repo} has no {file.path} at {commit}", field="uri")
        response.raise_for_status()
        for chunk in response.iter_bytes():
            written += len(chunk)
            if written > file.size:
                break
            output.write(chunk)
    if written != file.size or not _has_listed_hash(file, target):
        raise SourceUnavailable(
            f"{repo}: {file.path} differs from the size or hash that the hub lists"
        )


def _has_listed_hash(file: HubFile, target: Path) -> bool:
    """Returns True if a file has the listed SHA-256, or else the listed git blob hash."""
    if file.sha256:
        return file_sha256(target) == file.sha256
    data = target.read_bytes()
    found = hashlib.sha1(b"blob %d\0" % len(data) + data, usedforsecurity=False)
    return found.hexdigest() == file.git_sha1


def _endpoint() -> str:
    return (os.environ.get("HF_ENDPOINT") or "https://huggingface.co").rstrip("/")


@contextmanager
def _hub_errors_as_ours(repo: str) -> Iterator[None]:
    """Raises AdapterNotFound or SourceUnavailable for errors of the hub library."""
    from huggingface_hub.errors import (
        EntryNotFoundError,
        HfHubHTTPError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )
    from huggingface_hub.utils import get_session  # type: ignore[attr-defined]

    transport = type(get_session()).__module__.partition(".")[0]
    try:
        yield
    except (RepositoryNotFoundError, RevisionNotFoundError, EntryNotFoundError) as error:
        raise AdapterNotFound(
            f"the hub has no such repository, revision or file: {repo}", field="uri"
        ) from error
    except HfHubHTTPError as error:
        raise SourceUnavailable(f"the hub refused access to {repo}; check HF_TOKEN") from error
    except Exception as error:  # the hub library chooses the HTTP library, and changes it
        if isinstance(error, OSError) and error.errno in NO_SPACE:
            raise
        if type(error).__module__.partition(".")[0] != transport and not isinstance(error, OSError):
            raise
        kind = type(error).__name__
        raise SourceUnavailable(f"the hub cannot be reached for {repo}: {kind}") from error
