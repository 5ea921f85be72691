"""Generator: from a checked specification to the messages of its answer."""

from __future__ import annotations

import asyncio
import copy
import itertools
from collections.abc import AsyncGenerator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractAsyncContextManager, aclosing, nullcontext
from dataclasses import replace
from functools import partial
from typing import TypeVar

from adaplex.adapters.registry import AdapterRegistry, Lease
from adaplex.engine.async_engine import AsyncEngine
from adaplex.engine.errors import DeadlineExpired
from adaplex.engine.request import AdapterMode, Request, StepOutput, Timing
from adaplex.server import convert, text
from adaplex.server.answer import Answer
from adaplex.server.blocking import owned
from adaplex.server.calls import Call
from adaplex.server.convert import ModelLimits
from adaplex.server.metrics import FinishedReason, Metrics
from adaplex.v1.generation_pb2 import (
    GenerationDelta,
    GenerationFinished,
    GenerationSpec,
    GenerationStarted,
)

Event = GenerationStarted | GenerationDelta | GenerationFinished
AsyncEvents = AsyncGenerator[Event, None]
T = TypeVar("T")


class Generator:
    """Runs requests on the engine. Nothing it does blocks the event loop."""

    def __init__(
        self,
        *,
        engine: AsyncEngine,
        registry: AdapterRegistry,
        tokenizer: text.Tokenizer,
        limits: ModelLimits,
        metrics: Metrics,
        model_name: str,
        mode: AdapterMode,
    ) -> None:
        self._engine, self._registry, self._tokenizer = engine, registry, tokenizer
        self._limits, self._metrics = limits, metrics
        self._model_name, self._mode = model_name, mode
        self._numbers = itertools.count()
        # A Hugging Face tokenizer must not be used by two threads at once: one thread encodes with
        # this one, the event loop decodes with a copy.
        self._detokenizer = copy.deepcopy(tokenizer)
        self._tokenizing = ThreadPoolExecutor(1, "tokenizer")

    async def generate(self, spec: GenerationSpec, call: Call) -> AsyncEvents:
        """One `started` once the engine has admitted the request, deltas, one `finished`.

        Closing it aborts the request and releases the adapter.
        """
        sampling = convert.sampling_params(spec, self._limits)
        mode = convert.adapter_mode(spec, self._mode)
        salt, priority = convert.cache_salt(spec), convert.priority(spec)
        async with self._leased(spec.adapter) as lease:
            adapter = convert.adapter_ref(lease.record, mode) if lease else None
            prompt = await self._prompt(spec)
            room = self._limits.max_model_len - len(prompt)
            # Client ids may repeat; the engine's may not.
            request = Request(
                request_id=f"{call.request_id}#{next(self._numbers)}",
                prompt=prompt,
                sampling=replace(
                    sampling,
                    max_tokens=min(sampling.max_tokens, room),
                    min_tokens=min(sampling.min_tokens, room),
                ),
                adapter=adapter,
                cache_salt=salt,
                priority=priority,
                arrival=call.started,
                deadline=call.deadline,
            )
            async with aclosing(self._run(request, list(spec.sampling.stop), call)) as events:
                async for event in events:
                    yield event

    async def _run(self, request: Request, stops: Sequence[str], call: Call) -> AsyncEvents:
        """The engine's outputs as messages, counted and timed."""
        answer, admitted = Answer(self._detokenizer, request, stops), False
        reason: FinishedReason | None = "abort"
        try:
            async with aclosing(self._engine.generate(request)) as outputs:
                async for output in outputs:
                    if not admitted:
                        admitted = True
                        self._metrics.request_admitted(request.adapter, len(request.prompt))
                        call.log |= _applied(output)
                        yield answer.started(output, call.request_id, self._model_name)
                    if delta := answer.take(output):
                        self._metrics.tokens_generated(len(delta.token_ids), answer.since_last)
                        yield delta
                    if answer.ended:
                        break
            reason = answer.finish.value
            yield answer.finished()
        except Exception as error:
            if not admitted:
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

    def _leased(self, selector: str) -> AbstractAsyncContextManager[Lease | None]:
        """The adapter's content, kept from removal; nothing for the base. NOT_FOUND if unknown."""
        if not selector:
            return nullcontext()
        return owned(partial(self._registry.resolve, selector), Lease.release)

    async def _prompt(self, spec: GenerationSpec) -> tuple[int, ...]:
        """Checked token ids of the prompt, which leave room for an answer."""
        kind = spec.WhichOneof("prompt")
        convert.check("spec.prompt", kind is not None, "set text, token_ids or chat")
        if kind == "token_ids":
            prompt = convert.prompt_ids(spec, self._limits)
        elif kind == "chat":
            messages = convert.chat_messages(spec)
            prompt = await self._tokenize(text.encode_chat, messages)
        else:
            prompt = await self._tokenize(text.encode_text, spec.text)
        convert.check(f"spec.{kind}", len(prompt) > 0, "must give at least one token")
        longest = self._limits.max_model_len - 1
        reason = f"has {len(prompt)} tokens; at most {longest} leave room for an answer"
        convert.check(f"spec.{kind}", len(prompt) <= longest, reason)
        return prompt

    async def _tokenize(
        self, encode: Callable[[text.Tokenizer, T], tuple[int, ...]], prompt: T
    ) -> tuple[int, ...]:
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._tokenizing, encode, self._tokenizer, prompt)

    def close(self) -> None:
        """Ends the tokenizing thread."""
        self._tokenizing.shutdown(wait=False)


def _applied(output: StepOutput) -> dict[str, object]:
    """Log fields of an admitted request."""
    adapter = output.adapter
    if adapter is None:
        return {"adapter": ""}
    return {"adapter": adapter.name, "digest": adapter.digest, "mode": adapter.mode.value}


def _spent(request: Request, answer: Answer, timing: Timing | None) -> dict[str, object]:
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
