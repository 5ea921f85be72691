"""FakeServer: the three services and health over real gRPC, with canned responses."""
# ruff: noqa: N802 - methods have the names of the services

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent import futures
from dataclasses import dataclass, field
from typing import Any

import grpc
from google.protobuf.any_pb2 import Any as AnyMessage
from google.rpc.error_details_pb2 import ErrorInfo
from google.rpc.status_pb2 import Status
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_status import rpc_status

from adaplex.v1 import (
    adapters_pb2,
    adapters_pb2_grpc,
    generation_pb2,
    generation_pb2_grpc,
    server_pb2_grpc,
)
from client.canned import (
    adapter,
    adapter_event,
    deltas,
    finished,
    report,
    server_info,
    started,
    version,
)
from time_limits import WAIT_SECONDS


class FakeHealth(health.HealthServicer):
    """Health that becomes SERVING at the check number `serving_after`, if that is set."""

    checks = 0
    serving_after: int | None = None

    def Check(self, request: Any, context: Any) -> Any:
        self.checks += 1
        if self.checks == self.serving_after:
            self.set("", health_pb2.HealthCheckResponse.SERVING)
        return super().Check(request, context)


@dataclass
class Upload:
    """The messages of an upload."""

    metadata: adapters_pb2.AdapterUpload
    chunks: list[adapters_pb2.AdapterChunk] = field(default_factory=list)

    def content(self, index: int) -> bytes:
        """Returns a file's content, assembled by the offsets of its chunks."""
        content = bytearray(self.metadata.files[index].size_bytes)
        for chunk in self.chunks:
            if chunk.file_index == index:
                content[chunk.offset : chunk.offset + len(chunk.data)] = chunk.data
        return bytes(content)


class FakeServer(
    generation_pb2_grpc.GenerationServiceServicer,
    adapters_pb2_grpc.AdapterServiceServicer,
    server_pb2_grpc.ServerServiceServicer,
):
    """Returns canned responses and records requests, metadata and uploads; use it in `with`."""

    def __init__(self, credentials: grpc.ServerCredentials | None = None) -> None:
        self.requests: list[Any] = []
        self.metadata: list[dict[str, Any]] = []
        self.uploads: list[Upload] = []
        self.names = [f"adapter-{n}" for n in range(5)]
        self.refusals: list[tuple[str, str]] = []
        self.history = [adapter_event("alias")]
        self.events: list[generation_pb2.GenerateStreamResponse] | None = None
        """Events to stream instead of the canned ones."""
        self.has_template = True
        """False refuses chats as a model without a chat template does."""
        self.hold = False
        """True blocks streams after their first delta, and uploads after their first chunk, until
        the client cancels them.
        """
        self.cancelled = threading.Event()
        """Set when a blocked call has been cancelled by the client."""
        self.failure: Status | None = None
        """The status of every call, after `fail`."""
        self.fail_after_chunks: int | None = None
        """Number of chunks of an upload to read before the failure; None fails before the first."""
        self.health = FakeHealth()
        self._server = grpc.server(futures.ThreadPoolExecutor(8))
        generation_pb2_grpc.add_GenerationServiceServicer_to_server(self, self._server)
        adapters_pb2_grpc.add_AdapterServiceServicer_to_server(self, self._server)
        server_pb2_grpc.add_ServerServiceServicer_to_server(self, self._server)
        health_pb2_grpc.add_HealthServicer_to_server(self.health, self._server)
        port = (
            self._server.add_secure_port("127.0.0.1:0", credentials)
            if credentials
            else self._server.add_insecure_port("127.0.0.1:0")
        )
        self.target = f"127.0.0.1:{port}"

    def __enter__(self) -> FakeServer:
        self._server.start()
        return self

    def __exit__(self, *raised: object) -> None:
        self._server.stop(0).wait(WAIT_SECONDS)

    def fail(self, code: grpc.StatusCode, message: str, *details: Any) -> None:
        """Lets every later call fail with a status and its `google.rpc` details."""
        self.failure = _status(code, message, *details)

    # Generation.

    def Generate(self, request: Any, context: Any) -> Any:
        request_id = self._record(request, context)
        answers = deltas(request.spec)
        return generation_pb2.GenerateResponse(
            started=started(request.spec, request_id),
            text="".join(delta.text for delta in answers),
            token_ids=[token for delta in answers for token in delta.token_ids],
            logprobs=[entry for delta in answers for entry in delta.logprobs],
            finished=finished(),
        )

    def GenerateStream(self, request: Any, context: Any) -> Iterator[Any]:
        if not self.has_template and request.spec.HasField("chat"):
            missing = ErrorInfo(reason="CHAT_TEMPLATE_MISSING")
            refusal = _status(grpc.StatusCode.INVALID_ARGUMENT, "send text", missing)
            context.abort_with_status(rpc_status.to_status(refusal))
        request_id = self._record(request, context)
        message = generation_pb2.GenerateStreamResponse
        self._watch(context)
        if self.events is not None:
            yield from self.events
            return
        yield message(started=started(request.spec, request_id))
        for delta in deltas(request.spec):
            yield message(delta=delta)
            if self.hold:
                self.cancelled.wait(WAIT_SECONDS)
        yield message(finished=finished())

    # Adapters.

    def UploadAdapter(self, requests: Iterator[Any], context: Any) -> Any:
        upload = self._receive(requests, context)
        return adapters_pb2.UploadAdapterResponse(
            adapter=adapter(upload.metadata.name), report=report(), created=True
        )

    def ValidateAdapter(self, requests: Iterator[Any], context: Any) -> Any:
        self._receive(requests, context)
        return adapters_pb2.ValidateAdapterResponse(
            valid=not self.refusals, report=report(*self.refusals)
        )

    def LoadAdapter(self, request: Any, context: Any) -> Any:
        self._record(request, context)
        return adapters_pb2.LoadAdapterResponse(
            adapter=adapter(request.name), report=report(), created=False
        )

    def GetAdapter(self, request: Any, context: Any) -> Any:
        self._record(request, context)
        return adapters_pb2.GetAdapterResponse(
            adapter=adapter(request.name), report=report(), versions=[version(3), version(4)]
        )

    def GetAdapterHistory(self, request: Any, context: Any) -> Any:
        self._record(request, context)
        return adapters_pb2.GetAdapterHistoryResponse(events=self.history)

    def MergeAdapters(self, request: Any, context: Any) -> Any:
        self._record(request, context)
        return adapters_pb2.MergeAdaptersResponse(
            adapter=adapter(request.name), report=report(), created=True
        )

    def UpdateAdapter(self, request: Any, context: Any) -> Any:
        self._record(request, context)
        return adapters_pb2.UpdateAdapterResponse(adapter=adapter(request.name))

    def SetAlias(self, request: Any, context: Any) -> Any:
        self._record(request, context)
        return adapters_pb2.SetAliasResponse(adapter=adapter(request.name))

    def DeleteAlias(self, request: Any, context: Any) -> Any:
        self._record(request, context)
        return adapters_pb2.DeleteAliasResponse(adapter=adapter(request.name))

    def RollbackAlias(self, request: Any, context: Any) -> Any:
        self._record(request, context)
        return adapters_pb2.RollbackAliasResponse(adapter=adapter(request.name))

    def ListAdapters(self, request: Any, context: Any) -> Any:
        self._record(request, context)
        first = int(request.page_token or 0)
        last = first + request.page_size
        return adapters_pb2.ListAdaptersResponse(
            adapters=[adapter(name) for name in self.names[first:last]],
            next_page_token=str(last) if last < len(self.names) else "",
        )

    def UnloadAdapter(self, request: Any, context: Any) -> Any:
        self._record(request, context)
        return adapters_pb2.UnloadAdapterResponse(was_resident=request.name in self.names)

    def DeleteAdapter(self, request: Any, context: Any) -> Any:
        self._record(request, context)
        return adapters_pb2.DeleteAdapterResponse(versions_deleted=2)

    # Server.

    def GetServerInfo(self, request: Any, context: Any) -> Any:
        self._record(request, context)
        return server_info()

    def _record(self, request: Any, context: Any) -> str:
        """Records a request and its metadata, fails after `fail`; returns the request id."""
        metadata = dict(context.invocation_metadata())
        self.requests.append(request)
        self.metadata.append(metadata)
        self._fail_if_set(context)
        return str(metadata["x-request-id"])

    def _receive(self, requests: Iterator[Any], context: Any) -> Upload:
        self._watch(context)
        first = next(requests)
        self.uploads.append(upload := Upload(first.metadata))
        if self.fail_after_chunks is None:
            self._record(first, context)
        for request in requests:
            upload.chunks.append(request.chunk)
            if len(upload.chunks) == self.fail_after_chunks:
                self._record(first, context)
            if self.hold:
                self.cancelled.wait(WAIT_SECONDS)
        return upload

    def _watch(self, context: Any) -> None:
        """Sets `cancelled` at the end of a blocked call, which only the client can end."""
        if self.hold and not context.add_callback(self.cancelled.set):
            self.cancelled.set()

    def _fail_if_set(self, context: Any) -> None:
        if self.failure is not None:
            context.abort_with_status(rpc_status.to_status(self.failure))


def _status(code: grpc.StatusCode, message: str, *details: Any) -> Status:
    packed = []
    for detail in details:
        packed.append(AnyMessage())
        packed[-1].Pack(detail)
    return Status(code=code.value[0], message=message, details=packed)
