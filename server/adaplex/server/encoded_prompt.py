"""EncodedPrompt: the token ids of a text or of a conversation."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from adaplex.engine.errors import RequestInvalid
from adaplex.server.errors import NoChatTemplate
from adaplex.server.text import Tokenizer

TEMPLATE_ROLES = ("system", "user", "assistant")
"""Roles that every chat template renders or refuses by itself."""

Conversation = Sequence[dict[str, str]]
"""Messages with `role` and `content`."""


@dataclass(frozen=True)
class EncodedPrompt:
    """Token ids of a prompt, and reasons why they may not be the ones that its author meant."""

    token_ids: tuple[int, ...]
    warnings: tuple[str, ...] = ()


def leading_special(tokenizer: Tokenizer) -> tuple[int, ...]:
    """Returns the special tokens that the tokenizer adds before a text, such as one BOS."""
    plain = tuple(tokenizer("a", add_special_tokens=False).input_ids)
    whole = tuple(tokenizer("a").input_ids)
    starts = (n for n in range(len(whole)) if whole[n : n + len(plain)] == plain)
    return whole[: next(starts, 0)]


def encode_text(
    tokenizer: Tokenizer,
    text: str,
    *,
    leading: tuple[int, ...] = (),
    add_special_tokens: bool | None = None,
) -> EncodedPrompt:
    """Encodes a text with the special tokens that the tokenizer adds.

    `leading` are those before a text (`leading_special`). None for `add_special_tokens` adds them
    unless the text starts with them, as one does that a client rendered by a chat template.
    """
    if add_special_tokens is False:
        return EncodedPrompt(tuple(tokenizer(text, add_special_tokens=False).input_ids))
    ids = tuple(tokenizer(text).input_ids)
    if not leading or ids[: 2 * len(leading)] != leading * 2:
        return EncodedPrompt(ids)
    spelled = tokenizer.decode(list(leading), skip_special_tokens=False)
    if add_special_tokens:
        repeated = f"spec.text: starts with {spelled!r}, which add_special_tokens added once more"
        return EncodedPrompt(ids, (repeated,))
    left_out = (
        f"spec.text: starts with {spelled!r}, which was not added once more; "
        "set add_special_tokens to choose"
    )
    return EncodedPrompt(ids[len(leading) :], (left_out,))


def encode_chat(tokenizer: Tokenizer, messages: Conversation) -> EncodedPrompt:
    """Encodes a conversation and the opening of the assistant's turn by the chat template.

    Raises NoChatTemplate if the model has none, RequestInvalid if its template refuses the
    messages or leaves out those of a role.
    """
    if not tokenizer.chat_template:
        raise NoChatTemplate
    _check_roles(tokenizer, messages)
    return EncodedPrompt(tuple(_render(tokenizer, messages, tokenize=True, return_dict=False)))


def _check_roles(tokenizer: Tokenizer, messages: Conversation) -> None:
    """Raises RequestInvalid for a role that the template does not render. Other content of its
    messages would then render the same.
    """
    first = {m["role"]: i for i, m in reversed(list(enumerate(messages)))}
    others = {role: i for role, i in first.items() if role not in TEMPLATE_ROLES}
    if not others:
        return
    rendered = _render(tokenizer, messages, tokenize=False)
    for role, i in others.items():
        changed = [
            {**m, "content": m["content"] + "."} if m["role"] == role else m for m in messages
        ]
        if _render(tokenizer, changed, tokenize=False) == rendered:
            reason = f"{role!r} is not a role that the chat template renders"
            raise RequestInvalid(f"spec.chat.messages[{i}].role", reason)


def _render(tokenizer: Tokenizer, messages: Conversation, **options: bool) -> Sequence[int]:
    """Applies the chat template. Raises RequestInvalid if it refuses the messages."""
    try:
        rendered: Sequence[int] = tokenizer.apply_chat_template(
            list(messages), add_generation_prompt=True, **options
        )
    except Exception as error:  # a template is the model's code and may raise anything
        reason = f"refused by the chat template: {error}"
        raise RequestInvalid("spec.chat.messages", reason) from error
    return rendered
