"""Text in and out: prompts to token ids, tokens back to text as they come."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

from tokenizers.pre_tokenizers import ByteLevel

from adaplex.engine.errors import RequestInvalid

CONTEXT_TOKENS = 5
"""Prompt tokens decoded before the answer, so that its first space is not lost."""
MAX_HELD_TOKENS = 16
"""A character takes at most four tokens of one byte; more held back than this is not text."""
MAX_TEXTLESS_TOKENS = 16
"""Tokens without text that the window takes in. One can matter to what follows, as a first space
does; a run that is longer is of special tokens, which never do.
"""
REPLACEMENT = "\ufffd"
TOKEN_BYTES = 128
"""Of the longest token, where a tokenizer does not tell."""


class Tokenizer(Protocol):
    """What the edge uses of a Hugging Face tokenizer."""

    chat_template: Any

    def __call__(self, text: str) -> Any:
        """`.input_ids`, with the special tokens the model expects around a text."""
        ...

    def apply_chat_template(self, conversation: list[dict[str, str]], **options: Any) -> Any:
        """Ids of a conversation."""
        ...

    def decode(self, token_ids: list[int], **options: Any) -> Any:
        """Text of ids."""
        ...


def encode_text(tokenizer: Tokenizer, text: str) -> tuple[int, ...]:
    """Ids of a prompt text, special tokens as the tokenizer adds them by default."""
    return tuple(tokenizer(text).input_ids)


def encode_chat(tokenizer: Tokenizer, messages: list[dict[str, str]]) -> tuple[int, ...]:
    """Ids of a conversation, with the opening of the assistant's turn. Raises RequestInvalid."""
    if not tokenizer.chat_template:
        raise RequestInvalid("spec.chat", "this model has no chat template; send text")
    try:
        ids = tokenizer.apply_chat_template(
            messages, tokenize=True, add_generation_prompt=True, return_dict=False
        )
    except Exception as error:  # templates are the model's code and refuse in their own ways
        raise RequestInvalid("spec.chat.messages", f"the chat template says: {error}") from error
    return tuple(ids)


def longest_token_bytes(tokenizer: Tokenizer) -> int:
    """The most bytes of text that one token can stand for. Reads the whole vocabulary."""
    read = getattr(tokenizer, "get_vocab", None)
    vocabulary: dict[str, int] = read() if read is not None else {}
    if not vocabulary:
        return TOKEN_BYTES
    byte_level = _is_byte_level(tokenizer, vocabulary)
    letters = set(ByteLevel.alphabet()) if byte_level else set[str]()
    return max(len(t) if letters.issuperset(t) else len(t.encode()) for t in vocabulary)


def _is_byte_level(tokenizer: Tokenizer, vocabulary: dict[str, int]) -> bool:
    """Whether a letter of a token stands for a byte, as in GPT-2: there Ġ is a space."""
    space = vocabulary.get("Ġ")
    return space is not None and tokenizer.decode([space]) == " "


class Detokenizer:
    """Turns one answer's tokens into text, never half a character.

    Decodes a short window twice, with and without the new tokens, and gives out the difference:
    whatever a tokenizer does at a beginning, such as dropping a space, it does in both.
    """

    def __init__(self, tokenizer: Tokenizer, prompt: Sequence[int] = ()) -> None:
        self._tokenizer = tokenizer
        self._ids = list(prompt[-CONTEXT_TOKENS:])
        self._start = 0
        """Where the window begins."""
        self._given = len(self._ids)
        """Tokens whose text was given out."""

    def push(self, tokens: Sequence[int]) -> str:
        """Takes tokens; returns the text that is certain now."""
        self._ids.extend(tokens)
        held = len(self._ids) - self._given
        text = self._new_text()
        if text.endswith(REPLACEMENT) and held <= MAX_HELD_TOKENS:
            return ""
        if text:
            self._start = self._given
        elif len(self._ids) - self._start > CONTEXT_TOKENS + MAX_TEXTLESS_TOKENS:
            del self._ids[self._given :]
        self._given = len(self._ids)
        return text

    def flush(self, *, cut: bool) -> str:
        """The rest. When the answer was `cut` short, half a character at its end is dropped."""
        text = self._new_text()
        self._given = len(self._ids)
        return text.rstrip(REPLACEMENT) if cut else text

    def _new_text(self) -> str:
        """Text of the tokens not given out yet."""
        before = self._decode(self._ids[self._start : self._given])
        return self._decode(self._ids[self._start :])[len(before) :]

    def _decode(self, ids: list[int]) -> str:
        text: str = self._tokenizer.decode(
            ids, skip_special_tokens=True, clean_up_tokenization_spaces=False
        )
        return text


class StopStrings:
    """Finds the first stop string to be complete, however the text arrives in pieces."""

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = tuple(stops)
        self._held = ""
        self.found: str | None = None
        """The stop string that ended the answer."""

    def push(self, text: str, *, looking: bool = True) -> str:
        """Takes text; returns what is certain to come before any stop string.

        A stop string that is complete with text that came while not `looking` is text.
        """
        before = len(self._held)
        text = self._held + text
        ends = [
            (at + len(s), at, s)
            for s in self._stops
            if (at := text.find(s, max(0, before - len(s) + 1))) >= 0
        ]
        if ends and looking:
            _, at, self.found = min(ends)
            self._held = ""
            return text[:at]
        held = max((_overlap(text, stop) for stop in self._stops), default=0)
        self._held = text[len(text) - held :]
        return text[: len(text) - held]

    def flush(self) -> str:
        """What was held back; no stop string came of it."""
        held, self._held = self._held, ""
        return held


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that begins `stop`."""
    longest = min(len(text), len(stop) - 1)
    return next((n for n in range(longest, 0, -1) if text.endswith(stop[:n])), 0)
