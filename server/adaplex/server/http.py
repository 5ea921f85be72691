"""HttpServer: /metrics and /health on a port and a thread of their own."""

from __future__ import annotations

import socket
import ssl
import threading
from collections.abc import Callable, Iterable
from socketserver import ThreadingMixIn
from typing import TYPE_CHECKING, Any
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer, make_server

import structlog
from prometheus_client import CollectorRegistry, make_wsgi_app

from adaplex.server.access.authenticator import Credential
from adaplex.server.access.guard import Guard
from adaplex.server.errors import AuthenticationBusy, ScopeMissing, Unauthenticated
from adaplex.server.tls import Certificates

if TYPE_CHECKING:
    from wsgiref.types import StartResponse, WSGIApplication, WSGIEnvironment

log = structlog.get_logger("adaplex.http")

TIMEOUT_SECONDS = 10
"""Time that a client has for its handshake, and again to send its request."""
VERIFIED, COMMON_NAME = "SSL_CLIENT_VERIFY", "SSL_CLIENT_S_DN_CN"
"""WSGI variables: SUCCESS if the client has shown a certificate that tls_client_ca signed, and the
common name in it."""
HANDSHAKE = b"\x16"
"""First byte of a TLS client."""
PLAIN_ANSWER = (
    b"HTTP/1.0 400 Bad Request\r\nContent-Type: text/plain\r\nConnection: close\r\n\r\n"
    b"this port speaks HTTPS; use https://\n"
)
ALLOW = ("Allow", "GET, HEAD, OPTIONS")
"""Header that names the methods of every page."""


class HttpServer:
    """Serves until closed. Each request runs on its own thread and only reads."""

    def __init__(
        self,
        host: str,
        port: int,
        registry: CollectorRegistry,
        ready: Callable[[], bool],
        certificates: Certificates | None = None,
        guard: Guard | None = None,
    ) -> None:
        """Binds at once; port 0 picks a free one. Speaks TLS with certificates, and admits to
        metrics whom the guard admits. Raises OSError.
        """
        verify = certificates is not None and certificates.files.client_ca is not None
        metrics = _guarded(make_wsgi_app(registry), guard, verify=verify)
        app = _routes(metrics, ready)
        self._server = make_server(host, port, app, _ThreadingServer, _QuietHandler)
        self._server.certificates = certificates
        self._thread = threading.Thread(
            target=self._server.serve_forever, args=(0.05,), name="http", daemon=True
        )
        self._thread.start()

    @property
    def port(self) -> int:
        """Bound port."""
        return self._server.server_port

    def close(self) -> None:
        """Stops, unbinds and waits for the thread."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


def _routes(metrics: WSGIApplication, ready: Callable[[], bool]) -> WSGIApplication:
    """Returns the WSGI application of the port. HEAD gets the headers of GET."""

    def health(environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        if ready():
            return _answer(start_response, "200 OK", "serving")
        return _answer(start_response, "503 Service Unavailable", "not serving")

    pages: dict[str, WSGIApplication] = {"/metrics": metrics, "/health": health}

    def app(environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        page = pages.get(environ.get("PATH_INFO", "").rstrip("/"))
        method = environ["REQUEST_METHOD"]
        if page is None:
            return _answer(start_response, "404 Not Found", "not found")
        if method == "OPTIONS":
            return _answer(start_response, "200 OK", "", ALLOW)
        if method not in ("GET", "HEAD"):
            return _answer(start_response, "405 Method Not Allowed", "method not allowed", ALLOW)
        return page({**environ, "REQUEST_METHOD": "GET"}, start_response)

    return _without_body_of_head(app)


def _without_body_of_head(app: WSGIApplication) -> WSGIApplication:
    """Returns `app` with no body for HEAD, and with Content-Length for every response."""

    def outer(environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        started: list[tuple[str, list[tuple[str, str]]]] = []

        def start(status: str, headers: list[tuple[str, str]], *_: object) -> Callable[..., object]:
            started.append((status, headers))
            return lambda _data: None

        body = b"".join(app(environ, start))
        status, headers = started[-1]
        start_response(status, [*headers, ("Content-Length", str(len(body)))])
        return [] if environ["REQUEST_METHOD"] == "HEAD" else [body]

    return outer


def _guarded(metrics: WSGIApplication, guard: Guard | None, *, verify: bool) -> WSGIApplication:
    """Returns /metrics for callers that may read it; `verify` demands a client certificate."""

    def app(environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        if verify and environ[VERIFIED] != "SUCCESS":
            message = "needs a certificate signed by tls_client_ca"
            return _answer(start_response, "403 Forbidden", message)
        try:
            if guard is not None:
                header = environ.get("HTTP_AUTHORIZATION", "")
                guard.admit_to_metrics(Credential(header, environ[COMMON_NAME]))
        except Unauthenticated as error:
            challenge = ("WWW-Authenticate", "Bearer")
            return _answer(start_response, "401 Unauthorized", str(error), challenge)
        except ScopeMissing as error:
            return _answer(start_response, "403 Forbidden", str(error))
        except AuthenticationBusy as error:
            retry = ("Retry-After", f"{error.retry_after:.0f}")
            return _answer(start_response, "429 Too Many Requests", str(error), retry)
        return metrics(environ, start_response)

    return app


def _answer(
    start_response: StartResponse, status: str, message: str, *headers: tuple[str, str]
) -> list[bytes]:
    """Starts a response of one line of text, or of none, and returns its body."""
    start_response(status, [("Content-Type", "text/plain; charset=utf-8"), *headers])
    return [f"{message}\n".encode()] if message else []


class _ThreadingServer(ThreadingMixIn, WSGIServer):
    daemon_threads = True
    block_on_close = False
    certificates: Certificates | None = None

    def finish_request(self, request: Any, client_address: Any) -> None:
        """Answers one connection, on its own thread, after its handshake."""
        request.settimeout(TIMEOUT_SECONDS)
        if self.certificates is None:
            super().finish_request(request, client_address)
        elif request.recv(1, socket.MSG_PEEK) != HANDSHAKE:
            request.sendall(PLAIN_ANSWER)
        else:
            with self.certificates.context.wrap_socket(request, server_side=True) as secured:
                super().finish_request(secured, client_address)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Logs a connection that failed: one line, since clients can cause it at will."""
        log.debug("connection failed", exc_info=True)


class _QuietHandler(WSGIRequestHandler):
    timeout = TIMEOUT_SECONDS

    def get_environ(self) -> WSGIEnvironment:
        """Returns the variables of the request, and those of the client's certificate."""
        secured = isinstance(self.request, ssl.SSLSocket)
        certificate = (secured and self.request.getpeercert()) or {}
        subject = [pair for part in certificate.get("subject", ()) for pair in part]
        common = dict(subject).get("commonName", "")
        shown = {VERIFIED: "SUCCESS" if certificate else "NONE", COMMON_NAME: common}
        return super().get_environ() | shown

    def log_message(self, format: str, *args: object) -> None:
        """Logs nothing: a scrape is not worth a line."""
