"""A hub on loopback, with the file API that huggingface_hub uses to list and fetch files."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote


def git_sha1(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


@dataclass
class Hub:
    """One repository: files by path and commit, and the commit of each branch."""

    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)
    repo: str = "org/tone"
    requests: list[str] = field(default_factory=list)
    serve_instead: dict[str, bytes] = field(default_factory=dict)
    """Wrong bytes to send, by path."""
    status: int = 200
    """Status of every response, unless it is 200."""
    redirect: bool = False
    """True to redirect file requests to another path, as the real hub does."""
    url: str = ""

    def commit(self, branch: str, files: dict[str, bytes]) -> str:
        sha = hashlib.sha1(repr(sorted(files.items())).encode()).hexdigest()
        self.commits[sha] = files
        self.branches[branch] = sha
        return sha

    def answer(self, path: str) -> tuple[int, dict[str, str], bytes]:
        """Returns status, headers and body of the response."""
        self.requests.append(path)
        if self.status != 200:
            return self.status, {}, b"{}"
        plain = unquote(path.partition("?")[0])
        api = f"/api/models/{self.repo}"
        if plain.startswith(f"{api}/revision/") or plain == api:
            return self._api(plain.removeprefix(api).strip("/").split("/"))
        prefix = f"/{self.repo}/resolve/"
        if plain.startswith(prefix):
            if self.redirect:
                return 302, {"Location": f"/cdn{plain}"}, b""
            return self._file(plain.removeprefix(prefix))
        if plain.startswith(f"/cdn{prefix}"):
            return self._file(plain.removeprefix(f"/cdn{prefix}"))
        return 404, {"X-Error-Code": "RepoNotFound"}, b'{"error": "Repository not found"}'

    def _api(self, parts: list[str]) -> tuple[int, dict[str, str], bytes]:
        revision = parts[1] if len(parts) > 1 else "main"
        sha = self.branches.get(revision, revision)
        if sha not in self.commits:
            return 404, {"X-Error-Code": "RevisionNotFound"}, b'{"error": "no such revision"}'
        siblings = [_sibling(path, data) for path, data in self.commits[sha].items()]
        return 200, {}, json.dumps({"id": self.repo, "sha": sha, "siblings": siblings}).encode()

    def _file(self, rest: str) -> tuple[int, dict[str, str], bytes]:
        sha, _, path = rest.partition("/")
        if path in self.serve_instead:
            return 200, {}, self.serve_instead[path]
        data = self.commits.get(sha, {}).get(path)
        return (404, {}, b"") if data is None else (200, {}, data)


def _sibling(path: str, data: bytes) -> dict[str, Any]:
    entry: dict[str, Any] = {"rfilename": path, "size": len(data), "blobId": git_sha1(data)}
    if path.endswith((".safetensors", ".gguf")):
        sha256 = hashlib.sha256(data).hexdigest()
        entry["lfs"] = {"sha256": sha256, "size": len(data), "pointerSize": 100}
    return entry


@contextmanager
def serving(hub: Hub) -> Iterator[Hub]:
    """Serves the hub on a free port until the block ends."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            status, headers, body = hub.answer(self.path)
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: Any) -> None: ...

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    hub.url = f"http://127.0.0.1:{server.server_port}"
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
