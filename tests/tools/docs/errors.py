"""server/ERRORS.md, from the table of statuses."""

from __future__ import annotations

from collections.abc import Iterator

from adaplex.server.status import RETRIED, TABLE, UNEXPECTED, Mapping
from tools.docs.markdown import code, page, table

INTRO = """\
Every error that a client can see. The status carries details of google.rpc: `ErrorInfo` with the
reason and the domain `adaplex`, `RequestInfo` with the request id, `BadRequest` with every field at
fault, and, where the table says so, `RetryInfo` with the delay after which to try again. The
message of an `INTERNAL` status is the request id only; the server logs the cause under this id.

A client that cancels, or whose deadline passes during an RPC, sees `CANCELLED` or
`DEADLINE_EXCEEDED` from its own gRPC library, without details. Settings that cannot be served end
the start with exit code 2 and a line for each setting at fault."""


def document() -> str:
    """Returns the page."""
    return page("Errors", INTRO, "server/adaplex/server/status.py", _sections())


def _sections() -> Iterator[str]:
    header = ("reason", "gRPC status", "cause", "remedy", "error class")
    rows = [_row(kind.__name__, mapping, kind) for kind, mapping in TABLE.items()]
    yield table(header, [*rows, _row("", UNEXPECTED, Exception)])


def _row(name: str, mapping: Mapping, kind: type[BaseException]) -> tuple[str, ...]:
    status = code(mapping.code.name)
    if issubclass(kind, RETRIED):
        status += " with `RetryInfo`"
    return code(mapping.reason), status, mapping.cause, mapping.remedy, code(name)
