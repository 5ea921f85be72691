"""Generator: runs a request on the engine and yields the messages of its response."""

from __future__ import annotations

import asyncio
import copy
import itertools
import time
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AsyncExitStack, ExitStack, aclosing, asynccontextmanager, suppress
from dataclasses import replace
from functools import partial

from adaplex.adapters.api import AdapterRegistry, Lease
from adaplex.adapters.errors import AdapterNotFound
from adaplex.engine.async_engine import AsyncEngine
from adaplex.engine.errors import (
    DeadlineExpired,
    EngineFailed,
    LogitsOverflowed,
    QueueFull,
    ServerUnavailable,
)
from adaplex.engine.request import AdapterMode, AdapterRef, Request, SamplingParams, Timing
from adaplex.server import generation_messages as messages
from adaplex.server.generation_messages import ModelLimits
from adaplex.server.metrics import FinishedReason, Metrics
from adaplex.server.prompt_encoder import PromptEncoder
from adaplex.server.response import Response
from adaplex.server.rpc_context import RpcContext
from adaplex.server.slots import Slots
from adaplex.server.text import Tokenizer, special_tokens
from adaplex.server.threads import owned
from adaplex.v1.generation_pb2 import (
    GenerationDelta,
    GenerationFinished,
    GenerationSpec,
    GenerationStarted,
)

Event = GenerationStarted | GenerationDelta | GenerationFinished
AsyncEvents = AsyncGenerator[Event, None]
FetchMissing = Callable[[str], Awaitable[bool]]
"""Fetches the unknown adapter that a selector names. Returns True if it is known now."""
LEASE_THREADS = 4
"""Threads that resolve and release adapters."""
RETRY_SECONDS = 1.0
"""Delay that a client is given when too many requests are being prepared."""


class Generator:
    """Runs requests on the engine. Nothing blocks the event loop."""

    def __init__(
        self,
        *,
        engine: AsyncEngine,
        registry: AdapterRegistry,
        tokenizer: Tokenizer,
        limits: ModelLimits,
        max_preparing: int,
        metrics: Metrics,
        model_name: str,
        mode: AdapterMode,
        fetch_missing: FetchMissing,
    ) -> None:
        """`max_preparing` bounds the requests that are not in the engine yet; `fetch_missing`
        fetches an adapter that the registry does not know.
        """
        self._engine, self._registry, self._fetch_missing = engine, registry, fetch_missing
        self._limits, self._metrics = limits, metrics
        self._model_name, self._mode = model_name, mode
        self._numbers = itertools.count()
        self._prompts = PromptEncoder(tokenizer, limits)
        self._preparing = Slots(max_preparing, lambda: QueueFull(max_preparing, RETRY_SECONDS))
        # The event loop decodes with its own copy, as each thread of the encoder does.
        self._detokenizer = copy.deepcopy(tokenizer)
        self._special = special_tokens(self._detokenizer)
        # The shared pool may be full of slow work of other RPCs.
        self._lease_threads = ThreadPoolExecutor(LEASE_THREADS, "lease")
        self._unloading: set[asyncio.Task[None]] = set()

    async def generate(
        self, spec: GenerationSpec, rpc: RpcContext, *, interval: int = 1
    ) -> AsyncEvents:
        """Yields one `started` once the engine has admitted the request, then deltas of `interval`
        tokens except the first and the last, then one `finished`.

        Closing it aborts the request and releases the adapter.
        """
        sampling = messages.sampling_params(spec, self._limits)
        mode = messages.adapter_mode(spec)
        salt, priority = messages.cache_salt(spec), messages.priority(spec)
        selectors, key = messages.requested_adapters(spec), messages.routing_key(spec)
        self._prompts.check(spec)
        with self._preparation() as preparation:
            begun = time.monotonic()
            async with self._lease(selectors, key) as lease:
                fetched = time.monotonic() - begun
                adapter = AdapterRef.of(lease.record, mode, default=self._mode) if lease else None
                rpc.log |= _adapter_fields(adapter)
                encoded = await self._prompts.encode(spec)
                prompt = encoded.token_ids
                leading = adapter.traits.leading if adapter else 0
                room = self._limits.max_model_len - len(prompt) - leading
                request = Request(
                    # Client ids may repeat; the engine's may not.
                    request_id=f"{rpc.request_id}#{next(self._numbers)}",
                    prompt=prompt,
                    sampling=_within(sampling, room),
                    adapter=adapter,
                    cache_salt=salt,
                    priority=priority,
                    arrival=rpc.started,
                    deadline=rpc.deadline,
                )
                preparation.close()
                response = Response(
                    self._detokenizer,
                    request,
                    list(spec.sampling.stop),
                    special=self._special,
                    warnings=encoded.warnings,
                    lease=lease,
                    fetch_seconds=fetched if lease else 0.0,
                )
                async with aclosing(self._run(request, response, rpc, interval)) as events:
                    async for event in events:
                        yield event

    async def _run(
        self, request: Request, response: Response, rpc: RpcContext, interval: int
    ) -> AsyncEvents:
        """Yields the engine's outputs as messages, counted and timed."""
        admitted = False
        reason: FinishedReason | None = "abort"
        try:
            async with aclosing(self._engine.generate(request, interval=interval)) as steps:
                async for outputs in steps:
                    if not admitted:
                        admitted = True
                        self._metrics.request_admitted(request.adapter, len(request.prompt))
                        rpc.log |= _adapter_fields(outputs[0].adapter)
                        yield response.started(outputs[0], rpc.request_id, self._model_name)
                    if delta := response.add(outputs):
                        self._metrics.tokens_generated(len(delta.token_ids), response.gaps)
                        yield delta
                    if response.ended:
                        break
            reason = response.finish.value
            yield response.finished()
        except Exception as error:
            if isinstance(error, EngineFailed | LogitsOverflowed):
                reason = "error"  # work was done, if only in the step that failed
            elif not admitted:
                reason = None
                self._metrics.request_rejected(error)
            elif not isinstance(error, DeadlineExpired):
                reason = "error"
            raise
        finally:
            timing = response.timing() if response.ended else None
            if reason is not None:
                self._metrics.request_ended(reason, response.tokens, timing)
            rpc.log |= _usage_fields(request, response, timing)

    def _preparation(self) -> ExitStack:
        """Returns a slot that a request occupies until the engine has it. Raises QueueFull."""
        with ExitStack() as stack:
            try:
                stack.enter_context(self._preparing.slot())
            except QueueFull as error:
                self._metrics.request_rejected(error)
                raise
            return stack.pop_all()

    @asynccontextmanager
    async def _lease(
        self, selectors: Sequence[tuple[str, float]], routing_key: str
    ) -> AsyncIterator[Lease | None]:
        """Leases the adapters' content for the block; None for the base. Raises AdapterNotFound."""
        if not selectors:
            yield None
            return
        release = partial(self._release, asyncio.get_running_loop())
        resolve = partial(self._resolve, selectors, routing_key)
        async with AsyncExitStack() as stack:
            try:
                lease = await stack.enter_async_context(
                    owned(resolve, release, self._lease_threads)
                )
            except AdapterNotFound:
                if not any([await self._fetch_missing(selector) for selector, _ in selectors]):
                    raise
                lease = await stack.enter_async_context(
                    owned(resolve, release, self._lease_threads)
                )
            yield lease

    def _resolve(self, selectors: Sequence[tuple[str, float]], routing_key: str) -> Lease:
        """Leases one adapter or a mix. Called in a thread."""
        (selector, weight), *others = selectors
        if others or weight != 1.0:
            return self._registry.resolve_mix(selectors, routing_key=routing_key)
        return self._registry.resolve(selector, routing_key=routing_key)

    def _release(self, loop: asyncio.AbstractEventLoop, lease: Lease) -> None:
        """Ends a lease and unloads content that no name leads to any more. Called in a thread."""
        for digest in lease.release():
            loop.call_soon_threadsafe(self._unload, digest)

    def _unload(self, digest: str) -> None:
        """Unloads content in a task that nobody awaits."""
        task = asyncio.get_running_loop().create_task(self._unload_now(digest))
        self._unloading.add(task)
        task.add_done_callback(self._unloading.discard)

    async def _unload_now(self, digest: str) -> None:
        with suppress(ServerUnavailable):  # the engine stops, and its memory is freed with it
            await self._engine.unload(digest)

    def close(self) -> None:
        """Ends the threads."""
        self._prompts.close()
        self._lease_threads.shutdown(wait=False)


def _within(sampling: SamplingParams, room: int) -> SamplingParams:
    """Returns `sampling` with its token counts bounded by the room that the context has left."""
    return replace(
        sampling,
        max_tokens=min(sampling.max_tokens, room),
        min_tokens=min(sampling.min_tokens, room),
    )


def _adapter_fields(adapter: AdapterRef | None) -> dict[str, object]:
    """Returns the log fields of a request's adapter."""
    if adapter is None:
        return {"adapter": ""}
    return {"adapter": adapter.name, "digest": adapter.digest, "mode": adapter.mode.value}


def _usage_fields(request: Request, response: Response, timing: Timing | None) -> dict[str, object]:
    """Returns the log fields of a request that has ended."""
    fields: dict[str, object] = {
        "prompt_tokens": len(request.prompt),
        "completion_tokens": response.tokens,
    }
    if timing is not None:
        fields["finish"] = response.finish.value
        fields["queue_ms"] = round(timing.queued * 1e3, 2)
        fields["first_token_ms"] = round(timing.first_token * 1e3, 2)
    return fields
