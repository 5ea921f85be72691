from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from adaplex.server.text import (
    TOKEN_BYTES,
    Detokenizer,
    longest_token_bytes,
    special_tokens,
)
from server.fake_model import EOS, ByteTokenizer

CORPUS = [
    "the quick brown fox",
    "Grüße aus Köln",
    "日本語のテキスト",
    "🦊🐻‍❄️👩‍👩‍👧 emoji",
    "   spaces\n\n",
] * 3


class Wrapped:
    """A `tokenizers` tokenizer with the methods the edge uses."""

    chat_template = None

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer

    def __call__(self, text: str, **options: Any) -> Any:
        raise NotImplementedError

    def apply_chat_template(self, conversation: list[dict[str, str]], **options: Any) -> Any:
        raise NotImplementedError

    def get_vocab(self) -> dict[str, int]:
        vocabulary: dict[str, int] = self._tokenizer.get_vocab()
        return vocabulary

    def ids(self, text: str) -> list[int]:
        ids: list[int] = self._tokenizer.encode(text).ids
        return ids

    def decode(self, token_ids: Sequence[int], **options: Any) -> str:
        text: str = self._tokenizer.decode(list(token_ids), skip_special_tokens=True)
        return text


def byte_level() -> Wrapped:
    """Returns a tokenizer of byte merges, as in GPT-2 and Llama 3: tokens end inside characters."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=330, initial_alphabet=alphabet, special_tokens=["<eos>"], show_progress=False
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    return Wrapped(tokenizer)


def byte_fallback() -> Wrapped:
    """Returns a tokenizer with ▁ for a space and bytes for unknown text, as in Llama 2."""
    pieces = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", *"abcdefgh", "▁a", "ab"]
    vocabulary = {piece: index for index, piece in enumerate(pieces)}
    merges = [("▁", "a"), ("a", "b")]
    tokenizer = Tokenizer(
        models.BPE(vocabulary, merges, byte_fallback=True, unk_token="<unk>", fuse_unk=True)
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    tokenizer.add_special_tokens(["<eos>"])
    return Wrapped(tokenizer)


TOKENIZERS = {"byte_level": byte_level(), "byte_fallback": byte_fallback()}


def streamed(tokenizer: Any, ids: Sequence[int], prompt: Sequence[int] = ()) -> list[str]:
    """Returns the text of each token, and last the flushed text."""
    detokenizer = Detokenizer(tokenizer, prompt)
    return [*(detokenizer.push([token]) for token in ids), detokenizer.flush(cut=False)]


# Text is what UTF-8 can say: no lone surrogates.
texts = st.text(st.characters(exclude_categories=["Cs"])) | st.text(
    "ab 🦊é日\ufffd\u200d\n", max_size=40
)


@pytest.mark.parametrize("name", TOKENIZERS)
@given(text=texts)
def test_a_stream_says_what_the_whole_says(name: str, text: str) -> None:
    tokenizer = TOKENIZERS[name]
    ids = tokenizer.ids(text)
    whole = tokenizer.decode(ids)
    parts = streamed(tokenizer, ids)
    assert "".join(parts) == whole
    if "\ufffd" not in whole:
        assert not any("\ufffd" in part for part in parts)


@given(text=texts.filter(bool), data=st.data())
def test_a_cut_answer_is_a_beginning_without_half_a_character(
    text: str, data: st.DataObject
) -> None:
    tokenizer = TOKENIZERS["byte_level"]
    ids = tokenizer.ids(text)
    detokenizer = Detokenizer(tokenizer)
    cut = data.draw(st.integers(0, len(ids)))
    out = "".join(detokenizer.push([token]) for token in ids[:cut]) + detokenizer.flush(cut=True)
    assert text.startswith(out)


@pytest.mark.parametrize("step", [1, 2, 3, 7])
def test_several_tokens_a_step_give_the_same_text(step: int) -> None:
    tokenizer = TOKENIZERS["byte_level"]
    text = "Füchse 🦊 und 日本語, 👩‍👩‍👧!"
    ids = tokenizer.ids(text)
    detokenizer = Detokenizer(tokenizer)
    parts = [detokenizer.push(ids[at : at + step]) for at in range(0, len(ids), step)]
    assert "".join(parts) + detokenizer.flush(cut=False) == text


def test_the_first_space_after_the_prompt_is_kept() -> None:
    tokenizer = TOKENIZERS["byte_fallback"]
    prompt, answer = tokenizer.ids("ab"), tokenizer.ids("ab")
    assert tokenizer.decode(answer) == "ab"
    assert "".join(streamed(tokenizer, answer, prompt)) == " ab"


def test_bytes_that_never_make_a_character_do_not_hold_text_back_for_ever() -> None:
    out = streamed(ByteTokenizer(), [0x80] * 100 + list(b"ok"))
    assert any(out[:20])
    assert "".join(out) == "\ufffd" * 100 + "ok"


def test_special_tokens_are_not_text() -> None:
    assert "".join(streamed(ByteTokenizer(), [*b"a", EOS, EOS, *b"b"])) == "ab"


@pytest.mark.parametrize("name", TOKENIZERS)
@given(before=texts, run=st.integers(1, 60), after=texts)
def test_a_run_of_special_tokens_changes_no_text(
    name: str, before: str, run: int, after: str
) -> None:
    tokenizer = TOKENIZERS[name]
    eos = tokenizer.get_vocab()["<eos>"]
    ids = [*tokenizer.ids(before), *[eos] * run, *tokenizer.ids(after), *[eos] * run]
    assert "".join(streamed(tokenizer, ids)) == tokenizer.decode(ids)


class Counting(ByteTokenizer):
    """Counts the tokens that it decodes."""

    decoded = 0

    def decode(self, token_ids: list[int], **options: Any) -> str:
        self.decoded += len(token_ids)
        return super().decode(token_ids, **options)


@pytest.mark.parametrize("first", [b"", b"some text"])
def test_tokens_without_text_are_decoded_a_bounded_number_of_times(first: bytes) -> None:
    tokenizer, count = Counting(), 8_000
    assert "".join(streamed(tokenizer, [*first, *[EOS] * count, *b"ok"])) == first.decode() + "ok"
    assert tokenizer.decoded < 64 * count


def test_the_longest_token_is_measured_in_bytes_of_text() -> None:
    level = TOKENIZERS["byte_level"]
    assert longest_token_bytes(level) == max(map(len, level.get_vocab()))
    assert longest_token_bytes(TOKENIZERS["byte_fallback"]) == len("<0x00>")
    assert longest_token_bytes(ByteTokenizer()) == TOKEN_BYTES


@given(text=texts)
def test_no_text_has_fewer_tokens_than_the_longest_token_allows(text: str) -> None:
    tokenizer = TOKENIZERS["byte_level"]
    assert len(text.encode()) <= len(tokenizer.ids(text)) * longest_token_bytes(tokenizer)


def test_special_tokens_are_those_that_decoding_leaves_out() -> None:
    assert special_tokens(ByteTokenizer()) == {EOS: "<eos>"}

    class Speaking(ByteTokenizer):
        added_tokens_decoder: ClassVar = {EOS: "<eos>", ord("a"): "a"}

    assert special_tokens(Speaking()) == {EOS: "<eos>"}
    assert special_tokens(TOKENIZERS["byte_level"]) == {}
