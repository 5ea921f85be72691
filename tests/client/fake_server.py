"""FakeServer: the three services and health over real gRPC, with canned answers and a memory."""
# ruff: noqa: N802 - methods are named as in the services

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent import futures
from dataclasses import dataclass, field
from typing import Any

import grpc
from google.protobuf.any_pb2 import Any as AnyMessage
from google.protobuf.timestamp_pb2 import Timestamp
from google.rpc.status_pb2 import Status
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_status import rpc_status

from adaplex.v1 import (
    adapters_pb2,
    adapters_pb2_grpc,
    generation_pb2,
    generation_pb2_grpc,
    server_pb2,
    server_pb2_grpc,
)

DIGEST = "sha256:" + "ab" * 32
WORDS = ["The", " answer", " is", " 42", "."]
WAIT = 10.0
"""Seconds before a test that hangs fails instead."""


def logprob(token: int) -> generation_pb2.TokenLogprob:
    top = [generation_pb2.TopLogprob(token_id=token + 1, logprob=-1.5)]
    return generation_pb2.TokenLogprob(token_id=token, logprob=-0.25, top=top)


def started(spec: generation_pb2.GenerationSpec, request_id: str) -> Any:
    message = generation_pb2.GenerationStarted(request_id=request_id, model="tiny", prompt_tokens=7)
    if spec.adapter:
        name, _, version = spec.adapter.partition("@")
        message.adapter.name = name
        message.adapter.version = int(version or 3)
        message.adapter.digest = DIGEST
        message.adapter.mode = spec.mode or generation_pb2.ADAPTER_MODE_UNMERGED
        message.adapter.modules = 14
    elif spec.adapters:
        message.adapter.name = "+".join(part.adapter for part in spec.adapters)
        message.adapter.digest = DIGEST
        for part in spec.adapters:
            message.adapter.components.add(name=part.adapter, version=1, weight=part.weight)
    return message


def deltas(spec: generation_pb2.GenerationSpec) -> list[generation_pb2.GenerationDelta]:
    wanted = spec.sampling.HasField("logprobs")
    return [
        generation_pb2.GenerationDelta(
            text=word, token_ids=[token], logprobs=[logprob(token)] if wanted else []
        )
        for token, word in enumerate(WORDS)
    ]


def finished() -> generation_pb2.GenerationFinished:
    return generation_pb2.GenerationFinished(
        reason=generation_pb2.FINISH_REASON_STOP,
        stop="</s>",
        prompt_tokens=7,
        completion_tokens=len(WORDS),
        cached_tokens=4,
        queue_seconds=0.25,
        adapter_wait_seconds=0.125,
        first_token_seconds=0.5,
        total_seconds=2.0,
    )


def event(**kind: Any) -> generation_pb2.GenerateStreamResponse:
    return generation_pb2.GenerateStreamResponse(**kind)


def adapter(name: str, version: int = 1) -> adapters_pb2.Adapter:
    return adapters_pb2.Adapter(
        name=name,
        version=version,
        digest=DIGEST,
        family="lora",
        modules=2,
        max_rank=8,
        stored_bytes=3 << 20,
        packed_bytes=1 << 20,
        create_time=Timestamp(seconds=1_700_000_000, nanos=500_000_000),
        resident=version == 1,
        labels={"team": "blue"},
        aliases=[adapters_pb2.Alias(alias="default", targets=targets(95, 5))],
        source="upload",
        actor="ada",
        base_fingerprint=DIGEST,
        update_time=Timestamp(seconds=1_700_000_001),
        tier=adapters_pb2.RESIDENCY_TIER_ARENA,
        leading_tokens=12,
        invocation_tokens=[7, 8],
        merged_only=True,
    )


def targets(*weights: float) -> list[adapters_pb2.AliasTarget]:
    return [adapters_pb2.AliasTarget(version=3 + i, weight=w) for i, w in enumerate(weights)]


def version(number: int) -> adapters_pb2.AdapterVersion:
    return adapters_pb2.AdapterVersion(
        version=number,
        digest=DIGEST,
        create_time=Timestamp(seconds=1_700_000_000),
        stored_bytes=3 << 20,
        source="upload",
        actor="ada",
    )


def event_of(kind: str) -> adapters_pb2.AdapterEvent:
    return adapters_pb2.AdapterEvent(
        time=Timestamp(seconds=1_700_000_000),
        kind=kind,
        alias="prod",
        before=targets(1),
        after=targets(95, 5),
        actor="ada",
    )


def report(*refusals: tuple[str, str]) -> adapters_pb2.AdapterReport:
    return adapters_pb2.AdapterReport(
        family="lora",
        digest=DIGEST,
        modules=[
            adapters_pb2.ModuleReport(
                module=f"model.layers.{layer}.self_attn.q_proj",
                rank=8,
                scale=2.0,
                in_features=64,
                out_features=32,
                primitives=["low-rank", "bias"],
            )
            for layer in range(2)
        ],
        packed_bytes=1 << 20,
        refusals=[adapters_pb2.Refusal(where=where, reason=why) for where, why in refusals],
        notes=["task_type has no effect"],
        prefix_tokens=8,
        virtual_tokens=4,
        invocation_tokens=[7, 8],
        merged_only=True,
        merged_bytes=3 << 20,
    )


def server_info() -> server_pb2.GetServerInfoResponse:
    return server_pb2.GetServerInfoResponse(
        version="0.1.0",
        model=server_pb2.BaseModelInfo(
            name="tiny",
            architecture="LlamaForCausalLM",
            quantization="int4-group",
            group_size=32,
            compute_dtype="bfloat16",
            device="cpu",
            digest=DIGEST,
            weight_bytes=5 << 20,
            max_model_len=2048,
            vocab_size=300,
            modules=[
                server_pb2.AdaptableModule(
                    name="lm_head", kind="linear", in_features=64, out_features=300, is_head=True
                )
            ],
        ),
        capacity=server_pb2.CapacityInfo(
            requests_running=2,
            kv_blocks_total=100,
            kv_blocks_used=9,
            store_bytes_used=1 << 20,
            store_bytes_total=4 << 20,
            host_bytes_used=2 << 20,
            host_bytes_total=8 << 20,
        ),
        limits=server_pb2.LimitsInfo(max_concurrent_sequences=16, max_adapter_rank=256),
        uptime_seconds=61.5,
    )


class FakeHealth(health.HealthServicer):
    """Health that turns to SERVING when it has been looked at often enough."""

    looks = 0
    serving_after: int | None = None

    def Check(self, request: Any, context: Any) -> Any:
        self.looks += 1
        if self.looks == self.serving_after:
            self.set("", health_pb2.HealthCheckResponse.SERVING)
        return super().Check(request, context)


@dataclass
class Upload:
    """One upload as it arrived."""

    metadata: adapters_pb2.AdapterUpload
    chunks: list[adapters_pb2.AdapterChunk] = field(default_factory=list)

    def content(self, index: int) -> bytes:
        """A file put together by the offsets of its chunks."""
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
    """Answers every call the same way and remembers what was asked; use it in `with`."""

    def __init__(self, credentials: grpc.ServerCredentials | None = None) -> None:
        self.requests: list[Any] = []
        self.metadata: list[dict[str, Any]] = []
        self.uploads: list[Upload] = []
        self.names = [f"adapter-{n}" for n in range(5)]
        self.refusals: list[tuple[str, str]] = []
        self.history = [event_of("alias")]
        self.events: list[generation_pb2.GenerateStreamResponse] | None = None
        """Events to stream instead of the canned ones."""
        self.hold = False
        """Streams stop after their first delta, uploads after their first chunk, until they end."""
        self.cancelled = threading.Event()
        """Set when a held call has been ended from the other side."""
        self.failure: Status | None = None
        """What every call ends with, after `fail`."""
        self.fail_after_chunks: int | None = None
        """How much of an upload is read before the failure; None reads nothing."""
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
        self._server.stop(0).wait(WAIT)

    def fail(self, code: grpc.StatusCode, message: str, *details: Any) -> None:
        packed = []
        for detail in details:
            packed.append(AnyMessage())
            packed[-1].Pack(detail)
        self.failure = Status(code=code.value[0], message=message, details=packed)

    # Generation.

    def Generate(self, request: Any, context: Any) -> Any:
        request_id = self._remember(request, context)
        answers = deltas(request.spec)
        return generation_pb2.GenerateResponse(
            started=started(request.spec, request_id),
            text="".join(delta.text for delta in answers),
            token_ids=[token for delta in answers for token in delta.token_ids],
            logprobs=[entry for delta in answers for entry in delta.logprobs],
            finished=finished(),
        )

    def GenerateStream(self, request: Any, context: Any) -> Iterator[Any]:
        request_id = self._remember(request, context)
        message = generation_pb2.GenerateStreamResponse
        self._watch(context)
        if self.events is not None:
            yield from self.events
            return
        yield message(started=started(request.spec, request_id))
        for delta in deltas(request.spec):
            yield message(delta=delta)
            if self.hold:
                self.cancelled.wait(WAIT)
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
        self._remember(request, context)
        return adapters_pb2.LoadAdapterResponse(
            adapter=adapter(request.name), report=report(), created=False
        )

    def GetAdapter(self, request: Any, context: Any) -> Any:
        self._remember(request, context)
        return adapters_pb2.GetAdapterResponse(
            adapter=adapter(request.name), report=report(), versions=[version(3), version(4)]
        )

    def GetAdapterHistory(self, request: Any, context: Any) -> Any:
        self._remember(request, context)
        return adapters_pb2.GetAdapterHistoryResponse(events=self.history)

    def MergeAdapters(self, request: Any, context: Any) -> Any:
        self._remember(request, context)
        return adapters_pb2.MergeAdaptersResponse(
            adapter=adapter(request.name), report=report(), created=True
        )

    def UpdateAdapter(self, request: Any, context: Any) -> Any:
        self._remember(request, context)
        return adapters_pb2.UpdateAdapterResponse(adapter=adapter(request.name))

    def SetAlias(self, request: Any, context: Any) -> Any:
        self._remember(request, context)
        return adapters_pb2.SetAliasResponse(adapter=adapter(request.name))

    def DeleteAlias(self, request: Any, context: Any) -> Any:
        self._remember(request, context)
        return adapters_pb2.DeleteAliasResponse(adapter=adapter(request.name))

    def RollbackAlias(self, request: Any, context: Any) -> Any:
        self._remember(request, context)
        return adapters_pb2.RollbackAliasResponse(adapter=adapter(request.name))

    def ListAdapters(self, request: Any, context: Any) -> Any:
        self._remember(request, context)
        first = int(request.page_token or 0)
        last = first + request.page_size
        return adapters_pb2.ListAdaptersResponse(
            adapters=[adapter(name) for name in self.names[first:last]],
            next_page_token=str(last) if last < len(self.names) else "",
        )

    def UnloadAdapter(self, request: Any, context: Any) -> Any:
        self._remember(request, context)
        return adapters_pb2.UnloadAdapterResponse(was_resident=request.name in self.names)

    def DeleteAdapter(self, request: Any, context: Any) -> Any:
        self._remember(request, context)
        return adapters_pb2.DeleteAdapterResponse(versions_deleted=2)

    # Server.

    def GetServerInfo(self, request: Any, context: Any) -> Any:
        self._remember(request, context)
        return server_info()

    def _remember(self, request: Any, context: Any) -> str:
        """Keeps a request and its metadata, and fails if told to. The request id."""
        metadata = dict(context.invocation_metadata())
        self.requests.append(request)
        self.metadata.append(metadata)
        self._fail_if_told(context)
        return str(metadata["x-request-id"])

    def _receive(self, requests: Iterator[Any], context: Any) -> Upload:
        self._watch(context)
        first = next(requests)
        self.uploads.append(upload := Upload(first.metadata))
        if self.fail_after_chunks is None:
            self._remember(first, context)
        for request in requests:
            upload.chunks.append(request.chunk)
            if len(upload.chunks) == self.fail_after_chunks:
                self._remember(first, context)
            if self.hold:
                self.cancelled.wait(WAIT)
        return upload

    def _watch(self, context: Any) -> None:
        """A held call ends in no other way than from the other side."""
        if self.hold and not context.add_callback(self.cancelled.set):
            self.cancelled.set()

    def _fail_if_told(self, context: Any) -> None:
        if self.failure is not None:
            context.abort_with_status(rpc_status.to_status(self.failure))
