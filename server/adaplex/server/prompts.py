"""Prompts: a specification's prompt as token ids, made in threads, bounded in number and size."""

from __future__ import annotations

import asyncio
import copy
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

from adaplex.engine.errors import QueueFull
from adaplex.server import convert, text
from adaplex.server.convert import ModelLimits
from adaplex.v1.generation_pb2 import GenerationSpec

LONG_BYTES = 8 * 1024
"""A longer prompt is encoded beside the short ones, not before them."""
RETRY_SECONDS = 1.0
"""What a client that found no place is told."""


class Places:
    """The requests that the engine does not know of yet, a bounded number."""

    def __init__(self, limit: int) -> None:
        self._limit, self._taken = limit, 0

    @contextmanager
    def place(self) -> Iterator[None]:
        """One of the places. Raises QueueFull, never waits."""
        if self._taken >= self._limit:
            raise QueueFull(self._limit, RETRY_SECONDS)
        self._taken += 1
        try:
            yield
        finally:
            self._taken -= 1


class Lane:
    """A thread that encodes, with a tokenizer of its own: a Hugging Face tokenizer must not be
    used by two threads at once.
    """

    def __init__(self, tokenizer: text.Tokenizer, name: str) -> None:
        self._tokenizer = copy.deepcopy(tokenizer)
        self._thread = ThreadPoolExecutor(1, f"tokenizer-{name}")

    async def run(self, encode: Callable[[text.Tokenizer], tuple[int, ...]]) -> tuple[int, ...]:
        """What `encode` makes, once the prompts before it are done."""
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._thread, encode, self._tokenizer)

    def close(self) -> None:
        """Ends the thread; prompts that nobody waits for any more are dropped."""
        self._thread.shutdown(wait=False, cancel_futures=True)


class Prompts:
    """From `spec.prompt` to token ids."""

    def __init__(self, tokenizer: text.Tokenizer, limits: ModelLimits) -> None:
        self._limits = limits
        self._max_bytes = limits.max_model_len * text.longest_token_bytes(tokenizer)
        self._short, self._long = Lane(tokenizer, "short"), Lane(tokenizer, "long")

    def check(self, spec: GenerationSpec) -> None:
        """Raises RequestInvalid for what can be refused without encoding. Takes little time."""
        kind = spec.WhichOneof("prompt")
        convert.check("spec.prompt", kind is not None, "set text, token_ids or chat")
        if kind == "token_ids":
            convert.check_prompt_ids(spec, self._limits)
            return
        if kind == "chat":
            convert.check_chat(spec)
        size, most = _size(spec), self._max_bytes
        reason = f"has {size} bytes; {most} are more than any prompt of this model takes"
        convert.check(f"spec.{kind}", size <= most, reason)

    async def ids(self, spec: GenerationSpec) -> tuple[int, ...]:
        """Token ids of a prompt that `check` let pass; they leave room for an answer."""
        kind = spec.WhichOneof("prompt")
        if kind == "token_ids":
            return tuple(spec.token_ids.ids)
        ids = await (self._long if _size(spec) > LONG_BYTES else self._short).run(_encoder(spec))
        convert.check_length(f"spec.{kind}", len(ids), self._limits)
        return ids

    def close(self) -> None:
        """Ends the threads."""
        self._short.close()
        self._long.close()


def _encoder(spec: GenerationSpec) -> Callable[[text.Tokenizer], tuple[int, ...]]:
    """What turns the prompt into ids, in a thread."""
    if spec.WhichOneof("prompt") == "chat":
        messages = convert.chat_messages(spec)
        return lambda tokenizer: text.encode_chat(tokenizer, messages)
    return lambda tokenizer: text.encode_text(tokenizer, spec.text)


def _size(spec: GenerationSpec) -> int:
    """Bytes of the text to encode."""
    if spec.WhichOneof("prompt") == "chat":
        return sum(len(message.content.encode()) for message in spec.chat.messages)
    return len(spec.text.encode())
