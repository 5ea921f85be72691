"""Files beside an adapter that say how its author rendered text: chat template and added tokens.

Trainers save the tokenizer with the adapter. Text is encoded by the base's tokenizer, so that what
differs in these files is warned about.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from adaplex.adapters.program.base_spec import BaseSpec

TEMPLATE = "chat_template.jinja"
TOKENIZER = "tokenizer_config.json"
ADDED = "added_tokens.json"
TEXT_FILES = (TEMPLATE, TOKENIZER, ADDED)
MAX_SHOWN = 5
"""Tokens that a warning names."""


def text_warnings(directory: Path, base: BaseSpec) -> Iterator[str]:
    """Yields a warning for a chat template, and for added tokens, that differ from the base's."""
    config = _json(directory / TOKENIZER)
    where, template = TOKENIZER, config.get("chat_template")
    if (directory / TEMPLATE).is_file():
        where = TEMPLATE
        template = (directory / TEMPLATE).read_text(encoding="utf-8", errors="replace")
    if template and template != base.chat_template:
        yield (
            f"{where}: the adapter's chat template differs from the base's, which renders chats; "
            "to use the adapter's, render it in the client and send text"
        )
    foreign = sorted(
        token for token, number in _tokens(directory, config) if base.tokens.get(token) != number
    )
    if foreign:
        shown = ", ".join(repr(token)[:40] for token in foreign[:MAX_SHOWN])
        more = f" and {len(foreign) - MAX_SHOWN} more" if len(foreign) > MAX_SHOWN else ""
        yield (
            f"{TOKENIZER}: the adapter's tokenizer has tokens that the base's lacks: {shown}{more}"
            "; send token ids to use them"
        )


def _tokens(directory: Path, config: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Yields the added tokens and their ids."""
    yield from _json(directory / ADDED).items()
    decoder = config.get("added_tokens_decoder")
    for number, token in (decoder if isinstance(decoder, dict) else {}).items():
        if isinstance(token, dict) and isinstance(token.get("content"), str) and number.isdecimal():
            yield token["content"], int(number)


def _json(path: Path) -> Mapping[str, Any]:
    """Returns the object in a file; an empty one if there is none."""
    try:
        found = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}
