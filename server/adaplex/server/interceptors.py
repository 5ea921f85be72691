"""What every RPC goes through: request id, drain, error statuses, metrics, one log line."""

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
from adaplex.server.metrics import RpcMetrics
from adaplex.server.rich_status import status_of
from adaplex.server.rpc_context import (
    REQUEST_ID,
    Context,
    Inflight,
    RpcContext,
    actor_of,
    deadline_of,
    enter_rpc,
    request_id_of,
)
from adaplex.server.status import mapping_of

log = structlog.get_logger("adaplex.rpc")

Handler: TypeAlias = "grpc.RpcMethodHandler[Any, Any]"

UNCOUNTED = {HEALTH_SERVICE, REFLECTION_SERVICE}
"""Answered also while draining, and not waited for."""
KINDS = {
    (False, False): ("unary", "unary_unary", grpc.unary_unary_rpc_method_handler),
    (False, True): ("server_stream", "unary_stream", grpc.unary_stream_rpc_method_handler),
    (True, False): ("client_stream", "stream_unary", grpc.stream_unary_rpc_method_handler),
    (True, True): ("bidi_stream", "stream_stream", grpc.stream_stream_rpc_method_handler),
}
"""(request streams, response streams) -> name in metrics, handler attribute, constructor."""


# The base is generic in grpc-stubs only; at run time it takes no parameters.
class EdgeInterceptor(grpc.aio.ServerInterceptor):  # type: ignore[type-arg]
    """Wraps each handler; the only place where exceptions become statuses."""

    def __init__(self, metrics: RpcMetrics) -> None:
        self._metrics = metrics
        self.inflight = Inflight()
        self.draining = False
        """From now on refuse new work."""

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Handler]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> Handler:
        """The handler of a method, wrapped; None for an unknown method."""
        handler = await continuation(handler_call_details)
        if handler is None:
            return handler
        kind, attribute, make = KINDS[handler.request_streaming, handler.response_streaming]
        behaviour = getattr(handler, attribute)
        _, service, method = handler_call_details.method.split("/", 2)

        async def wrapped(request: Any, context: Context) -> Any:
            async with self._call(service, method, kind, context):
                result = behaviour(request, context)
                if not isinstance(result, AsyncIterator):
                    return await result
                # Written here, not yielded: a cancelled RPC then unwinds the handler at once.
                # The handlers of streams are generators, which have the aclose that aclosing wants.
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
    async def _call(
        self, service: str, method: str, kind: str, context: Context
    ) -> AsyncIterator[None]:
        """The life of one RPC around its handler."""
        now = time.monotonic()
        call = RpcContext(service, method, kind, "", now, deadline_of(context, now))
        code, failure = grpc.StatusCode.OK, None
        self._metrics.started(call)
        try:
            call.request_id = request_id_of(context)
            call.actor = actor_of(context)
            enter_rpc(call)
            echo = ((REQUEST_ID, call.request_id),)
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
            late = call.expired
            code = grpc.StatusCode.DEADLINE_EXCEEDED if late else grpc.StatusCode.CANCELLED
            raise
        except grpc.aio.AbortError:  # the handler chose its status; health does
            code = context.code()
            raise
        except Exception as error:
            failure, code = error, mapping_of(error).code
            await _abort(context, error, call.request_id)
        finally:
            seconds = time.monotonic() - call.started
            self._metrics.handled(call, code.name, seconds)
            _log(call, code, seconds, failure)


async def _abort(context: Context, error: Exception, request_id: str) -> None:
    """Ends the RPC with the error's rich status."""
    status = rpc_status.to_status(status_of(error, request_id))
    trailing = (*status.trailing_metadata, *(((REQUEST_ID, request_id),) if request_id else ()))
    await context.abort(status.code, status.details, trailing)


def _log(
    call: RpcContext, code: grpc.StatusCode, seconds: float, failure: Exception | None
) -> None:
    """One line an RPC; health and reflection only when debugging."""
    fields = {
        "request_id": call.request_id,
        "method": f"{call.service}/{call.method}",
        "code": code.name,
        "total_ms": round(seconds * 1e3, 2),
        **call.log,
    }
    if failure is None:
        (log.debug if call.service in UNCOUNTED else log.info)("rpc", **fields)
    elif code is grpc.StatusCode.INTERNAL:
        log.error("rpc", **fields, exc_info=failure)
    else:
        log.info("rpc", **fields, error=str(failure))
