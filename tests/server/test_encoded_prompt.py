from __future__ import annotations

from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

from adaplex.engine.errors import RequestInvalid
from adaplex.server.encoded_prompt import encode_chat, encode_text, leading_special
from adaplex.server.errors import NoChatTemplate
from server.fake_model import ByteTokenizer

SPECIAL = ["<s>", "<sop>", "</s>"]
BOS, SOP, EOS = range(3)
ROLES = (
    "{% for m in messages if m.role in ['system', 'user', 'assistant', 'tool'] %}"
    "{{ m.role }}:{{ m.content }}\n{% endfor %}"
)


def tokenizer(single: str, template: str | None = None) -> Any:
    """Returns a tokenizer of bytes that adds special tokens as `single` says."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate([*SPECIAL, *alphabet])}
    inner = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    inner.decoder = decoders.ByteLevel()
    inner.add_special_tokens(SPECIAL)
    inner.post_processor = TemplateProcessing(
        single=single, special_tokens=[(token, vocabulary[token]) for token in SPECIAL]
    )
    wrapped = PreTrainedTokenizerFast(tokenizer_object=inner, bos_token="<s>", eos_token="</s>")
    wrapped.chat_template = template
    return wrapped


LEADING = {"<s> $A": (BOS,), "<s> <sop> $A": (BOS, SOP), "<s> $A </s>": (BOS,), "$A </s>": ()}


@pytest.mark.parametrize(("single", "expected"), LEADING.items())
def test_the_special_tokens_before_a_text_are_found(single: str, expected: tuple[int, ...]) -> None:
    assert leading_special(tokenizer(single)) == expected


def test_a_tokenizer_that_adds_nothing_has_no_leading_tokens() -> None:
    assert leading_special(ByteTokenizer()) == ()


@pytest.mark.parametrize("single", LEADING)
def test_a_rendered_text_gets_no_special_token_twice(single: str) -> None:
    encoder, leading = tokenizer(single), LEADING[single]
    once = encode_text(encoder, "abc", leading=leading)
    assert once.warnings == ()
    assert once.token_ids == tuple(encoder("abc").input_ids)
    rendered = encoder.decode(list(leading)) + "abc"
    again = encode_text(encoder, rendered, leading=leading)
    assert again.token_ids == once.token_ids
    assert len(again.warnings) == (1 if leading else 0)


def test_whether_special_tokens_are_added_can_be_chosen() -> None:
    encoder = tokenizer("<s> $A </s>")
    text = "<s>abc"
    plain = tuple(encoder(text, add_special_tokens=False).input_ids)
    without = encode_text(encoder, text, leading=(BOS,), add_special_tokens=False)
    assert (without.token_ids, without.warnings) == (plain, ())
    added = encode_text(encoder, text, leading=(BOS,), add_special_tokens=True)
    assert added.token_ids == (BOS, *plain, EOS)
    assert "'<s>'" in added.warnings[0]
    fine = encode_text(encoder, "abc", leading=(BOS,), add_special_tokens=True)
    assert (fine.token_ids, fine.warnings) == ((BOS, *plain[1:], EOS), ())


def test_a_conversation_is_rendered_by_the_chat_template() -> None:
    prompt = encode_chat(ByteTokenizer(), [{"role": "user", "content": "x"}])
    assert prompt.token_ids == tuple(b"user:x\n")


def conversation(role: str, content: str = "42") -> list[dict[str, str]]:
    return [{"role": "user", "content": "x"}, {"role": role, "content": content}]


@pytest.mark.parametrize("role", ["system", "assistant", "tool"])
def test_a_role_that_the_template_renders_is_taken(role: str) -> None:
    encoder = tokenizer("$A", ROLES)
    ids = encode_chat(encoder, conversation(role)).token_ids
    assert encoder.decode(list(ids)) == f"user:x\n{role}:42\n"


@pytest.mark.parametrize("content", ["42", ""])
def test_a_role_that_the_template_leaves_out_is_refused(content: str) -> None:
    with pytest.raises(RequestInvalid, match="'developer' is not a role") as caught:
        encode_chat(tokenizer("$A", ROLES), conversation("developer", content))
    assert caught.value.field == "spec.chat.messages[1].role"


def test_a_template_that_refuses_a_role_is_quoted() -> None:
    template = "{{ raise_exception('only users speak') }}"
    with pytest.raises(RequestInvalid, match="only users speak"):
        encode_chat(tokenizer("$A", template), conversation("tool"))


def test_a_model_without_a_chat_template_says_so() -> None:
    with pytest.raises(NoChatTemplate, match="no chat template"):
        encode_chat(tokenizer("$A"), conversation("user"))
