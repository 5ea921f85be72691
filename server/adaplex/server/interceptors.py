"""EdgeInterceptor: request id, drain, error status, metrics and one log line for every RPC."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import aclosing, asynccontextmanager
from typing import Any, TypeAlias

import grpc
import structlog
from grpc_health.v1.health import SERVICE_NAME as HEALTH_SERVICE
from grpc_reflection.v1alpha.reflection import SERVICE_NAME as REFLECTION_SERVICE
from grpc_status import rpc_status

from adaplex.engine.errors import ServerUnavailable
from adaplex.server.access.guard import Guard
from adaplex.server.metrics import RpcMetrics
from adaplex.server.rich_status import status_of
from adaplex.server.rpc_context import (
    REQUEST_ID,
    Context,
    Inflight,
    RpcContext,
    actor_of,
    credential_of,
    deadline_of,
    enter_rpc,
    request_id_of,
)
from adaplex.server.status import mapping_of

log = structlog.get_logger("adaplex.rpc")

Handler: TypeAlias = "grpc.RpcMethodHandler[Any, Any]"

UNCOUNTED = {HEALTH_SERVICE, REFLECTION_SERVICE}
"""Services that stay available during a drain, which does not wait for them."""
KINDS = {
    (False, False): ("unary", "unary_unary", grpc.unary_unary_rpc_method_handler),
    (False, True): ("server_stream", "unary_stream", grpc.unary_stream_rpc_method_handler),
    (True, False): ("client_stream", "stream_unary", grpc.stream_unary_rpc_method_handler),
    (True, True): ("bidi_stream", "stream_stream", grpc.stream_stream_rpc_method_handler),
}
"""(request streams, response streams) -> metric label, handler attribute, constructor."""


# The base is generic in grpc-stubs only; at run time it takes no parameters.
class EdgeInterceptor(grpc.aio.ServerInterceptor):  # type: ignore[type-arg]
    """Wraps every handler; the only place that turns exceptions into statuses."""

    def __init__(self, metrics: RpcMetrics, guard: Guard | None = None) -> None:
        self._metrics, self._guard = metrics, guard
        self.inflight = Inflight()
        self.draining = False
        """True once new RPCs are refused."""

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Handler]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> Handler:
        """Returns the wrapped handler of a method, None for an unknown method."""
        handler = await continuation(handler_call_details)
        if handler is None:
            return handler
        kind, attribute, make = KINDS[handler.request_streaming, handler.response_streaming]
        behaviour = getattr(handler, attribute)
        _, service, method = handler_call_details.method.split("/", 2)

        async def wrapped(request: Any, context: Context) -> Any:
            async with self._rpc(service, method, kind, context):
                result = behaviour(request, context)
                if not isinstance(result, AsyncIterator):
                    return await result
                # Messages are written here, not yielded, so that a cancelled RPC unwinds the
                # handler at once. Handlers of streams are generators, which have `aclose`.
                async with aclosing(result) as messages:  # type: ignore[type-var]
                    async for message in messages:
                        await context.write(message)
                return None

        return make(
            wrapped,
            request_deserializer=handler.request_deserializer,
            response_serializer=handler.response_serializer,
        )

    @asynccontextmanager
    async def _rpc(
        self, service: str, method: str, kind: str, context: Context
    ) -> AsyncIterator[None]:
        """Runs one RPC around its handler: context, drain, status, metrics and log."""
        now = time.monotonic()
        rpc = RpcContext(service, method, kind, "", now, deadline_of(context, now))
        code, failure = grpc.StatusCode.OK, None
        self._metrics.started(rpc)
        try:
            rpc.request_id = request_id_of(context)
            rpc.actor = actor_of(context)
            if self._guard is not None:
                rpc.principal = await self._guard.admit(service, method, credential_of(context))
                rpc.actor = rpc.principal.name if rpc.principal else ""
            enter_rpc(rpc)
            echo = ((REQUEST_ID, rpc.request_id),)
            context.set_trailing_metadata(echo)
            await context.send_initial_metadata(echo)
            if service in UNCOUNTED:
                yield
            elif self.draining:
                raise ServerUnavailable("the server is shutting down")
            else:
                with self.inflight:
                    yield
        except asyncio.CancelledError:
            late = rpc.expired
            code = grpc.StatusCode.DEADLINE_EXCEEDED if late else grpc.StatusCode.CANCELLED
            raise
        except grpc.aio.AbortError:  # the handler set its own status, as health does
            code = context.code()
            raise
        except Exception as error:
            failure, code = error, mapping_of(error).code
            await _abort(context, error, rpc.request_id)
        finally:
            seconds = time.monotonic() - rpc.started
            self._metrics.handled(rpc, code.name, seconds)
            _log(rpc, code, seconds, failure)


async def _abort(context: Context, error: Exception, request_id: str) -> None:
    """Aborts the RPC with the rich status of the error."""
    status = rpc_status.to_status(status_of(error, request_id))
    trailing = (*status.trailing_metadata, *(((REQUEST_ID, request_id),) if request_id else ()))
    await context.abort(status.code, status.details, trailing)


def _log(rpc: RpcContext, code: grpc.StatusCode, seconds: float, failure: Exception | None) -> None:
    """Logs one line per RPC, for health and reflection at level debug."""
    fields = {
        "request_id": rpc.request_id,
        "method": f"{rpc.service}/{rpc.method}",
        **({"principal": rpc.principal.name} if rpc.principal else {}),
        "code": code.name,
        "total_ms": round(seconds * 1e3, 2),
        **rpc.log,
    }
    if failure is None:
        (log.debug if rpc.service in UNCOUNTED else log.info)("rpc", **fields)
    elif code is grpc.StatusCode.INTERNAL:
        log.error("rpc", **fields, exc_info=failure)
    else:
        log.info("rpc", **fields, error=str(failure))
