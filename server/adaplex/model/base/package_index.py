"""PackageIndex: fetches one wheel from a simple index (PEP 503 HTML, PEP 691 JSON), without pip."""

from __future__ import annotations

import base64
import json
import netrc
import ssl
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from html.parser import HTMLParser
from http.client import HTTPException
from pathlib import Path
from shutil import copyfile
from typing import Any
from urllib.error import HTTPError, URLError
from urllib.parse import unquote, urldefrag, urljoin, urlsplit, urlunsplit
from urllib.request import HTTPSHandler, OpenerDirector, Request, build_opener

from adaplex.model.base.index_settings import IndexSettings
from adaplex.model.progress import Progress

ACCEPT = (
    "application/vnd.pypi.simple.v1+json, application/vnd.pypi.simple.v1+html;q=0.2, "
    "text/html;q=0.1"
)
TIMEOUT = 30.0
"""Seconds without a byte after which a server is given up."""
ATTEMPTS = 3
CHUNK = 1 << 20
MAX_PAGE_BYTES = 32 << 20
QUARTERS = 4
"""Lines of progress in a download."""


class FetchFailed(Exception):
    """No index has the wheel, or none could be reached. Names each with its reason."""


@dataclass(frozen=True)
class Link:
    """A file that an index lists."""

    name: str
    url: str
    sha256: str
    """Hex; empty if the index does not give it."""


@dataclass(frozen=True)
class Wheel:
    """A pinned version of a package."""

    package: str
    version: str
    sha256: str

    @property
    def prefix(self) -> str:
        """Beginning of the wheel's file name."""
        return f"{self.package.replace('-', '_')}-{self.version}-"

    def is_name(self, name: str) -> bool:
        """True for the file name of a wheel of this package and version."""
        if "/" in name or not name.endswith(".whl"):
            return False
        return name.replace("-", "_").lower().startswith(self.prefix.replace("-", "_"))


def fetch_wheel(wheel: Wheel, folder: Path, settings: IndexSettings, progress: Progress) -> Path:
    """Copies or downloads a wheel into `folder` and returns its path; its content is not checked.

    Raises FetchFailed.
    """
    for source in settings.folders:
        for path in sorted(source.glob("*.whl")):
            if wheel.is_name(path.name):
                return Path(copyfile(path, folder / path.name))
    reasons = [f"{path}: has no such wheel" for path in settings.folders]
    for url in settings.indexes:
        index = PackageIndex(url, settings.ca_file)
        try:
            link = index.find(wheel)
            if link is not None:
                return index.download(link, folder / link.name, progress)
            reasons.append(f"{index.shown}: has no such wheel")
        except (OSError, HTTPException, ValueError, LookupError) as error:
            reasons.append(f"{index.shown}: {_reason(error)}")
    raise FetchFailed("; ".join(reasons) or "PIP_NO_INDEX is set and PIP_FIND_LINKS is not")


class PackageIndex:
    """One simple index. Credentials come from its URL or from netrc, and go to its host only."""

    def __init__(self, url: str, ca_file: str | None = None) -> None:
        parts = urlsplit(url)
        host = parts.netloc.rpartition("@")[2]
        self._host = host
        self._credentials = _credentials(parts.username, parts.password, parts.hostname or "")
        self._url = urlunsplit((parts.scheme, host, parts.path.rstrip("/"), "", ""))
        self._opener = _opener(ca_file)

    @property
    def shown(self) -> str:
        """The URL without credentials."""
        return self._url

    def find(self, wheel: Wheel) -> Link | None:
        """Returns the link of a wheel, the one of its hash where the index gives hashes; None if
        it has none. Raises OSError, HTTPException, ValueError or LookupError.
        """
        try:
            with closing(self._open(f"{self._url}/{wheel.package}/", ACCEPT)) as page:
                body, kind, base = page.read(MAX_PAGE_BYTES), page.headers["Content-Type"], page.url
        except HTTPError as error:
            if error.code in (404, 410):
                return None
            raise
        links = _json_links if "json" in (kind or "") else _html_links
        found = [link for link in links(body, base) if wheel.is_name(link.name)]
        pinned = [link for link in found if link.sha256 == wheel.sha256]
        return next(iter(pinned or found), None)

    def download(self, link: Link, target: Path, progress: Progress) -> Path:
        """Downloads a file and returns its path; tries again if the connection is lost. Raises
        OSError or HTTPException.
        """
        for attempt in range(1, ATTEMPTS + 1):
            try:
                self._copy(link, target, progress)
                return target
            except HTTPError:
                raise
            except (OSError, HTTPException) as error:
                if attempt == ATTEMPTS:
                    raise
                progress(f"the download stopped ({_reason(error)}): attempt {attempt + 1}")
        raise AssertionError("the last attempt returns or raises")

    def _copy(self, link: Link, target: Path, progress: Progress) -> None:
        with closing(self._open(link.url, "*/*")) as source, target.open("wb") as file:
            total = int(source.headers.get("Content-Length") or 0)
            done, shown = 0, 0
            while chunk := source.read(CHUNK):
                file.write(chunk)
                done += len(chunk)
                quarter = QUARTERS * done // total if total else 0
                if shown < quarter < QUARTERS:
                    progress(f"downloaded {done / 1e6:.0f} of {total / 1e6:.0f} MB")
                    shown = quarter
            if done < total:
                raise URLError(f"the connection ended after {done} of {total} bytes")

    def _open(self, url: str, accept: str) -> Any:
        """Opens a URL. A redirect to another host gets no credentials."""
        request = Request(url, headers={"Accept": accept, "User-Agent": "adaplex"})
        if self._credentials and urlsplit(url).netloc == self._host:
            request.add_unredirected_header("Authorization", self._credentials)
        return self._opener.open(request, timeout=TIMEOUT)


def _opener(ca_file: str | None) -> OpenerDirector:
    """Returns an opener that honours the proxies of the environment, and SSL_CERT_FILE."""
    return build_opener(HTTPSHandler(context=ssl.create_default_context(cafile=ca_file)))


def _credentials(user: str | None, password: str | None, host: str) -> str:
    """Returns the value of the Authorization header, by the URL's user or netrc; may be empty."""
    if user is None:
        try:
            found = netrc.netrc().authenticators(host)
        except (OSError, netrc.NetrcParseError):
            found = None
        if found is None:
            return ""
        user, _, password = found
    pair = f"{unquote(user)}:{unquote(password or '')}"
    return "Basic " + base64.b64encode(pair.encode()).decode()


def _json_links(body: bytes, base: str) -> Iterator[Link]:
    """Yields the files of a PEP 691 page. Raises ValueError or LookupError."""
    for file in json.loads(body)["files"]:
        yield Link(file["filename"], urljoin(base, file["url"]), file["hashes"].get("sha256", ""))


def _html_links(body: bytes, base: str) -> Iterator[Link]:
    """Yields the files of a PEP 503 page; the hash is the fragment of a link."""
    parser = _Anchors()
    parser.feed(body.decode(errors="replace"))
    for href in parser.found:
        url, fragment = urldefrag(urljoin(parser.base or base, href))
        name = unquote(urlsplit(url).path.rpartition("/")[2])
        kind, _, digest = fragment.partition("=")
        yield Link(name, url, digest if kind == "sha256" else "")


class _Anchors(HTMLParser):
    """Collects the targets of links, and the page's base."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []
        self.base = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        href = dict(attrs).get("href") or ""
        if tag == "a" and href:
            self.found.append(href)
        elif tag == "base":
            self.base = href


def _reason(error: BaseException) -> str:
    reason = getattr(error, "reason", None) or error
    return str(reason) or type(error).__name__
