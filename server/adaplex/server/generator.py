"""Generator: from a checked specification to the messages of its answer."""

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

from adaplex.adapters.errors import AdapterNotFound
from adaplex.adapters.registry.registry import AdapterRegistry
from adaplex.adapters.storage.lease import Lease
from adaplex.engine.async_engine import AsyncEngine
from adaplex.engine.errors import (
    DeadlineExpired,
    EngineFailed,
    LogitsOverflowed,
    QueueFull,
    ServerUnavailable,
)
from adaplex.engine.request import AdapterMode, AdapterRef, Request, SamplingParams, Timing
from adaplex.server import convert
from adaplex.server.convert import ModelLimits
from adaplex.server.metrics import FinishedReason, Metrics
from adaplex.server.prompts import Places, Prompts
from adaplex.server.response import Response
from adaplex.server.rpc_context import RpcContext
from adaplex.server.text import Tokenizer
from adaplex.server.threads import owned
from adaplex.v1.generation_pb2 import (
    GenerationDelta,
    GenerationFinished,
    GenerationSpec,
    GenerationStarted,
)

Event = GenerationStarted | GenerationDelta | GenerationFinished
AsyncEvents = AsyncGenerator[Event, None]
Bring = Callable[[str], Awaitable[bool]]
"""Fetches the adapter that a selector names, if it can be found; whether it is known now."""
LEASE_THREADS = 4
"""For resolving and releasing adapters."""


class Generator:
    """Runs requests on the engine. Nothing it does blocks the event loop."""

    def __init__(
        self,
        *,
        engine: AsyncEngine,
        registry: AdapterRegistry,
        tokenizer: Tokenizer,
        limits: ModelLimits,
        max_entering: int,
        metrics: Metrics,
        model_name: str,
        mode: AdapterMode,
        bring: Bring,
    ) -> None:
        """`max_entering` bounds the requests that are not with the engine yet; `bring` looks
        elsewhere for an adapter that is unknown here.
        """
        self._engine, self._registry, self._bring = engine, registry, bring
        self._limits, self._metrics = limits, metrics
        self._model_name, self._mode = model_name, mode
        self._numbers = itertools.count()
        self._prompts, self._places = Prompts(tokenizer, limits), Places(max_entering)
        # The event loop decodes with a copy of its own, as each thread of Prompts encodes.
        self._detokenizer = copy.deepcopy(tokenizer)
        # Other RPCs fill the shared threads for as long as they like.
        self._leasing = ThreadPoolExecutor(LEASE_THREADS, "lease")
        self._unloading: set[asyncio.Task[None]] = set()

    async def generate(
        self, spec: GenerationSpec, call: RpcContext, *, interval: int = 1
    ) -> AsyncEvents:
        """One `started` once the engine has admitted the request, deltas of `interval` tokens but
        for the first and the last, one `finished`.

        Closing it aborts the request and releases the adapter.
        """
        sampling = convert.sampling_params(spec, self._limits)
        mode = convert.adapter_mode(spec)
        salt, priority = convert.cache_salt(spec), convert.priority(spec)
        wanted, key = convert.wanted_adapters(spec), convert.routing_key(spec)
        self._prompts.check(spec)
        with self._entered() as entered:
            begun = time.monotonic()
            async with self._leased(wanted, key) as lease:
                fetched = time.monotonic() - begun
                adapter = convert.adapter_ref(lease.record, mode, self._mode) if lease else None
                call.log |= _bound(adapter)
                prompt = await self._prompts.ids(spec)
                room = (
                    self._limits.max_model_len - len(prompt) - (adapter.leading if adapter else 0)
                )
                request = Request(
                    # Client ids may repeat; the engine's may not.
                    request_id=f"{call.request_id}#{next(self._numbers)}",
                    prompt=prompt,
                    sampling=_fitted(sampling, room),
                    adapter=adapter,
                    cache_salt=salt,
                    priority=priority,
                    arrival=call.started,
                    deadline=call.deadline,
                )
                entered.close()
                answer = Response(
                    self._detokenizer,
                    request,
                    list(spec.sampling.stop),
                    lease=lease,
                    fetch_seconds=fetched if lease else 0.0,
                )
                async with aclosing(self._run(request, answer, call, interval)) as events:
                    async for event in events:
                        yield event

    async def _run(
        self, request: Request, answer: Response, call: RpcContext, interval: int
    ) -> AsyncEvents:
        """The engine's outputs as messages, counted and timed."""
        admitted = False
        reason: FinishedReason | None = "abort"
        try:
            async with aclosing(self._engine.generate(request, interval=interval)) as steps:
                async for outputs in steps:
                    if not admitted:
                        admitted = True
                        self._metrics.request_admitted(request.adapter, len(request.prompt))
                        call.log |= _bound(outputs[0].adapter)
                        yield answer.started(outputs[0], call.request_id, self._model_name)
                    if delta := answer.take(outputs):
                        self._metrics.tokens_generated(len(delta.token_ids), answer.gaps)
                        yield delta
                    if answer.ended:
                        break
            reason = answer.finish.value
            yield answer.finished()
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
            timing = answer.timing() if answer.ended else None
            if reason is not None:
                self._metrics.request_ended(reason, answer.tokens, timing)
            call.log |= _spent(request, answer, timing)

    def _entered(self) -> ExitStack:
        """A place for a request until it is the engine's. Raises QueueFull."""
        with ExitStack() as entered:
            try:
                entered.enter_context(self._places.place())
            except QueueFull as error:
                self._metrics.request_rejected(error)
                raise
            return entered.pop_all()

    @asynccontextmanager
    async def _leased(
        self, wanted: Sequence[tuple[str, float]], routing_key: str
    ) -> AsyncIterator[Lease | None]:
        """The adapters' content, kept from removal; nothing for the base. NOT_FOUND if unknown."""
        if not wanted:
            yield None
            return
        release = partial(self._release, asyncio.get_running_loop())
        open_ = partial(self._resolve, wanted, routing_key)
        async with AsyncExitStack() as stack:
            try:
                lease = await stack.enter_async_context(owned(open_, release, self._leasing))
            except AdapterNotFound:
                if not any([await self._bring(selector) for selector, _ in wanted]):
                    raise
                lease = await stack.enter_async_context(owned(open_, release, self._leasing))
            yield lease

    def _resolve(self, wanted: Sequence[tuple[str, float]], routing_key: str) -> Lease:
        """In a thread: one adapter as it is, or several combined."""
        (selector, weight), *others = wanted
        if others or weight != 1.0:
            return self._registry.resolve_combination(wanted, routing_key=routing_key)
        return self._registry.resolve(selector, routing_key=routing_key)

    def _release(self, loop: asyncio.AbstractEventLoop, lease: Lease) -> None:
        """In a thread: ends a lease, and what nobody can ask for any more leaves the memory."""
        for digest in lease.release():
            loop.call_soon_threadsafe(self._unload, digest)

    def _unload(self, digest: str) -> None:
        """Tells the engine; nobody waits for it."""
        task = asyncio.get_running_loop().create_task(self._unloaded(digest))
        self._unloading.add(task)
        task.add_done_callback(self._unloading.discard)

    async def _unloaded(self, digest: str) -> None:
        with suppress(ServerUnavailable):  # the engine stops: its memory goes with it
            await self._engine.unload(digest)

    def close(self) -> None:
        """Ends the threads."""
        self._prompts.close()
        self._leasing.shutdown(wait=False)


def _fitted(sampling: SamplingParams, room: int) -> SamplingParams:
    """With no more tokens asked for than the context holds."""
    return replace(
        sampling,
        max_tokens=min(sampling.max_tokens, room),
        min_tokens=min(sampling.min_tokens, room),
    )


def _bound(adapter: AdapterRef | None) -> dict[str, object]:
    """Log fields of a request whose adapter is known."""
    if adapter is None:
        return {"adapter": ""}
    return {"adapter": adapter.name, "digest": adapter.digest, "mode": adapter.mode.value}


def _spent(request: Request, answer: Response, timing: Timing | None) -> dict[str, object]:
    """Log fields of a request that left."""
    fields: dict[str, object] = {
        "prompt_tokens": len(request.prompt),
        "completion_tokens": answer.tokens,
    }
    if timing is not None:
        fields["finish"] = answer.finish.value
        fields["queue_ms"] = round(timing.queued * 1e3, 2)
        fields["first_token_ms"] = round(timing.first_token * 1e3, 2)
    return fields
