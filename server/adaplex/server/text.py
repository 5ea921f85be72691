"""Text: the tokenizer's interface, and decoding of tokens step by step."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

from tokenizers.pre_tokenizers import ByteLevel

CONTEXT_TOKENS = 5
"""Prompt tokens decoded before the response, so that its first space is not lost."""
MAX_PENDING_TOKENS = 16
"""Tokens held back for an incomplete character. A character has at most four tokens of one byte;
more tokens without a character are not text.
"""
MAX_TEXTLESS_TOKENS = 16
"""Tokens without text that stay in the window. One of them can matter to the next text, as a first
space does; a longer run consists of special tokens, which never matter.
"""
REPLACEMENT = "\ufffd"
TOKEN_BYTES = 128
"""Bytes of the longest token of a tokenizer that does not list its vocabulary."""


class Tokenizer(Protocol):
    """The methods of a Hugging Face tokenizer that the edge uses."""

    chat_template: Any

    def __call__(self, text: str, **options: Any) -> Any:
        """Returns an object whose `input_ids` include the special tokens that the model expects,
        unless `add_special_tokens` is false.
        """
        ...

    def apply_chat_template(self, conversation: list[dict[str, str]], **options: Any) -> Any:
        """Returns the token ids of a conversation, or its text if `tokenize` is false."""
        ...

    def decode(self, token_ids: list[int], **options: Any) -> Any:
        """Returns the text of token ids."""
        ...


def special_tokens(tokenizer: Tokenizer) -> dict[int, str]:
    """Returns the tokens that `decode` leaves out of a text, by id, with their spelling."""
    added: dict[int, Any] = getattr(tokenizer, "added_tokens_decoder", None) or {}
    return {
        token: str(content)
        for token, content in added.items()
        if str(content) and not tokenizer.decode([token], skip_special_tokens=True)
    }


def longest_token_bytes(tokenizer: Tokenizer) -> int:
    """Returns the most bytes of text that one token can encode. Reads the whole vocabulary."""
    read = getattr(tokenizer, "get_vocab", None)
    vocabulary: dict[str, int] = read() if read is not None else {}
    if not vocabulary:
        return TOKEN_BYTES
    byte_level = _is_byte_level(tokenizer, vocabulary)
    letters = set(ByteLevel.alphabet()) if byte_level else set[str]()
    return max(len(t) if letters.issuperset(t) else len(t.encode()) for t in vocabulary)


def _is_byte_level(tokenizer: Tokenizer, vocabulary: dict[str, int]) -> bool:
    """Returns True if a letter of a token is a byte, as in GPT-2, where Ġ is a space."""
    space = vocabulary.get("Ġ")
    return space is not None and tokenizer.decode([space]) == " "


class Detokenizer:
    """Decodes the tokens of one response step by step, in whole characters.

    Decodes a short window twice, with and without the new tokens, and returns the difference: what
    a tokenizer does at the beginning of a text, such as dropping a space, it does in both.
    """

    def __init__(self, tokenizer: Tokenizer, prompt: Sequence[int] = ()) -> None:
        self._tokenizer = tokenizer
        self._ids = list(prompt[-CONTEXT_TOKENS:])
        self._start = 0
        """Index of the window's first token."""
        self._emitted = len(self._ids)
        """Number of tokens whose text was returned."""

    def push(self, tokens: Sequence[int]) -> str:
        """Adds tokens. Returns their text up to the last complete character."""
        self._ids.extend(tokens)
        pending = len(self._ids) - self._emitted
        text = self._new_text()
        if text.endswith(REPLACEMENT) and pending <= MAX_PENDING_TOKENS:
            return ""
        if text:
            self._start = self._emitted
        elif len(self._ids) - self._start > CONTEXT_TOKENS + MAX_TEXTLESS_TOKENS:
            del self._ids[self._emitted :]
        self._emitted = len(self._ids)
        return text

    def flush(self, *, cut: bool) -> str:
        """Returns the rest; drops an incomplete last character if the response was `cut` short."""
        text = self._new_text()
        self._emitted = len(self._ids)
        return text.rstrip(REPLACEMENT) if cut else text

    def _new_text(self) -> str:
        """Returns the text of the tokens after the emitted ones."""
        before = self._decode(self._ids[self._start : self._emitted])
        return self._decode(self._ids[self._start :])[len(before) :]

    def _decode(self, ids: list[int]) -> str:
        text: str = self._tokenizer.decode(
            ids, skip_special_tokens=True, clean_up_tokenization_spaces=False
        )
        return text
