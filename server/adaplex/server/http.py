"""HttpServer: /metrics and /health on a port and a thread of their own."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable
from socketserver import ThreadingMixIn
from typing import TYPE_CHECKING
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer, make_server

from prometheus_client import CollectorRegistry, make_wsgi_app

if TYPE_CHECKING:
    from wsgiref.types import StartResponse, WSGIApplication, WSGIEnvironment


class HttpServer:
    """Serves until closed. Each request runs on its own thread and only reads."""

    def __init__(
        self, host: str, port: int, registry: CollectorRegistry, ready: Callable[[], bool]
    ) -> None:
        """Binds at once; port 0 picks a free one. Raises OSError."""
        app = _routes(make_wsgi_app(registry), ready)
        self._server = make_server(host, port, app, _ThreadingServer, _QuietHandler)
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
    """Returns the WSGI application of the port."""

    def app(environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        path = environ.get("PATH_INFO", "")
        if environ["REQUEST_METHOD"] not in ("GET", "HEAD"):
            status, body = "405 Method Not Allowed", b"method not allowed\n"
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


class _QuietHandler(WSGIRequestHandler):
    timeout = 10
    """Seconds that a client has to send its request."""

    def log_message(self, format: str, *args: object) -> None:
        """Logs nothing: a scrape is not worth a line."""
