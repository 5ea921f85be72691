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

from adaplex.server.tls import Certificates

if TYPE_CHECKING:
    from wsgiref.types import StartResponse, WSGIApplication, WSGIEnvironment

log = structlog.get_logger("adaplex.http")

TIMEOUT_SECONDS = 10
"""Time that a client has for its handshake, and again to send its request."""
VERIFIED = "SSL_CLIENT_VERIFY"
"""WSGI variable: SUCCESS if the client has shown a certificate that tls_client_ca signed."""
HANDSHAKE = b"\x16"
"""First byte of a TLS client."""
PLAIN_ANSWER = (
    b"HTTP/1.0 400 Bad Request\r\nContent-Type: text/plain\r\nConnection: close\r\n\r\n"
    b"this port speaks HTTPS; use https://\n"
)


class HttpServer:
    """Serves until closed. Each request runs on its own thread and only reads."""

    def __init__(
        self,
        host: str,
        port: int,
        registry: CollectorRegistry,
        ready: Callable[[], bool],
        certificates: Certificates | None = None,
    ) -> None:
        """Binds at once; port 0 picks a free one. Speaks TLS with certificates. Raises OSError."""
        verify = certificates is not None and certificates.files.client_ca is not None
        app = _routes(make_wsgi_app(registry), ready, verify=verify)
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


def _routes(
    metrics: WSGIApplication, ready: Callable[[], bool], *, verify: bool
) -> WSGIApplication:
    """Returns the WSGI application of the port. `verify` demands a certificate for metrics."""

    def app(environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        path = environ.get("PATH_INFO", "")
        if environ["REQUEST_METHOD"] not in ("GET", "HEAD"):
            status, body = "405 Method Not Allowed", b"method not allowed\n"
        elif path == "/metrics" and verify and environ[VERIFIED] != "SUCCESS":
            status, body = "403 Forbidden", b"needs a certificate signed by tls_client_ca\n"
        elif path == "/metrics":
            return metrics(environ, start_response)
        elif path == "/health":
            is_ready = ready()
            status = "200 OK" if is_ready else "503 Service Unavailable"
            body = b"serving\n" if is_ready else b"not serving\n"
        else:
            status, body = "404 Not Found", b"not found\n"
        start_response(status, [("Content-Type", "text/plain"), ("Content-Length", str(len(body)))])
        return [body]

    return app


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
        """Returns the variables of the request, and VERIFIED."""
        environ = super().get_environ()
        secured = isinstance(self.request, ssl.SSLSocket)
        shown = secured and bool(self.request.getpeercert())
        return environ | {VERIFIED: "SUCCESS" if shown else "NONE"}

    def log_message(self, format: str, *args: object) -> None:
        """Logs nothing: a scrape is not worth a line."""
