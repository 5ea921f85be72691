"""PromptEncoder: checks prompts and encodes them into token ids, in threads."""

from __future__ import annotations

import asyncio
import copy
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

from adaplex.server import generation_messages as messages
from adaplex.server import text
from adaplex.server.encoded_prompt import (
    EncodedPrompt,
    encode_chat,
    encode_text,
    leading_special,
)
from adaplex.server.generation_messages import ModelLimits
from adaplex.v1.generation_pb2 import GenerationSpec

LONG_BYTES = 8 * 1024
"""Size from which a prompt is encoded in the thread of long prompts."""


class EncoderThread:
    """A thread with a tokenizer of its own: two threads must not share a Hugging Face tokenizer."""

    def __init__(self, tokenizer: text.Tokenizer, name: str) -> None:
        self._tokenizer = copy.deepcopy(tokenizer)
        self._thread = ThreadPoolExecutor(1, f"tokenizer-{name}")

    async def run(self, encode: Callable[[text.Tokenizer], EncodedPrompt]) -> EncodedPrompt:
        """Returns the result of `encode`, which runs after the calls before it."""
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._thread, encode, self._tokenizer)

    def close(self) -> None:
        """Ends the thread and drops the prompts that it has not begun."""
        self._thread.shutdown(wait=False, cancel_futures=True)


class PromptEncoder:
    """Encodes `spec.prompt`. Short prompts have a thread of their own and never wait for long ones.

    The caller bounds the number of prompts, `check` their size.
    """

    def __init__(self, tokenizer: text.Tokenizer, limits: ModelLimits) -> None:
        self._limits = limits
        self._max_bytes = limits.max_model_len * text.longest_token_bytes(tokenizer)
        self._leading = leading_special(tokenizer)
        self._short = EncoderThread(tokenizer, "short")
        self._long = EncoderThread(tokenizer, "long")

    def check(self, spec: GenerationSpec) -> None:
        """Raises RequestInvalid for a prompt that can be refused without encoding it."""
        kind = spec.WhichOneof("prompt")
        messages.check("spec.prompt", kind is not None, "must be set: text, token_ids or chat")
        messages.check_special_tokens(spec)
        if kind == "token_ids":
            messages.check_prompt_ids(spec, self._limits)
            return
        if kind == "chat":
            messages.check_chat(spec)
        size, limit = _size(spec), self._max_bytes
        reason = f"has {size} bytes; no prompt of this model has more than {limit}"
        messages.check(f"spec.{kind}", size <= limit, reason)

    async def encode(self, spec: GenerationSpec) -> EncodedPrompt:
        """Encodes a checked prompt. Raises RequestInvalid if its tokens do not fit."""
        kind = spec.WhichOneof("prompt")
        if kind == "token_ids":
            return EncodedPrompt(tuple(spec.token_ids.ids))
        thread = self._long if _size(spec) > LONG_BYTES else self._short
        prompt = await thread.run(self._encoder(spec))
        messages.check_length(f"spec.{kind}", len(prompt.token_ids), self._limits)
        return prompt

    def _encoder(self, spec: GenerationSpec) -> Callable[[text.Tokenizer], EncodedPrompt]:
        """Returns the function that encodes the prompt, to be called in a thread."""
        if spec.WhichOneof("prompt") == "chat":
            conversation = messages.chat_messages(spec)
            return lambda tokenizer: encode_chat(tokenizer, conversation)
        special = spec.add_special_tokens if spec.HasField("add_special_tokens") else None
        return lambda tokenizer: encode_text(
            tokenizer, spec.text, leading=self._leading, add_special_tokens=special
        )

    def close(self) -> None:
        """Ends the threads."""
        self._short.close()
        self._long.close()


def _size(spec: GenerationSpec) -> int:
    """Bytes of the text to encode."""
    if spec.WhichOneof("prompt") == "chat":
        return sum(len(message.content.encode()) for message in spec.chat.messages)
    return len(spec.text.encode())
