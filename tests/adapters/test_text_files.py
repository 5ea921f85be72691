from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from adaplex.adapters.text_files import MAX_SHOWN, text_warnings
from adapters.handmade import BASE
from tiny import CHAT_TEMPLATE, byte_tokenizer

TOKENIZER = byte_tokenizer()
SPEC = replace(BASE, chat_template=CHAT_TEMPLATE, tokens=TOKENIZER.get_vocab())


def warnings(folder: Path) -> list[str]:
    return list(text_warnings(folder, SPEC))


def test_the_tokenizer_of_the_base_and_none_need_no_warning(tmp_path: Path) -> None:
    assert warnings(tmp_path) == []
    TOKENIZER.save_pretrained(tmp_path)
    assert warnings(tmp_path) == []


@pytest.mark.parametrize("jinja", [True, False], ids=["jinja", "config"])
def test_another_chat_template_is_named(jinja: bool, tmp_path: Path) -> None:
    other = byte_tokenizer()
    other.chat_template = "{{ messages }}"
    other.save_pretrained(tmp_path, save_jinja_files=jinja)
    (warning,) = warnings(tmp_path)
    assert warning.startswith("chat_template.jinja" if jinja else "tokenizer_config.json")
    assert "differs from the base's" in warning


def test_added_tokens_are_named(tmp_path: Path) -> None:
    names = [f"<tool{n}>" for n in range(MAX_SHOWN + 2)]
    (tmp_path / "added_tokens.json").write_text(json.dumps({names[0]: 320}))
    decoder: dict[str, Any] = {str(320 + n): {"content": name} for n, name in enumerate(names)}
    config = {"added_tokens_decoder": decoder | {"0": {"content": "<pad>"}}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    (warning,) = warnings(tmp_path)
    assert "'<tool0>'" in warning
    assert "<pad>" not in warning


@pytest.mark.parametrize("text", ["", "[]", "{", '{"added_tokens_decoder": {"x": 1, "2": {}}}'])
def test_damaged_files_are_no_error(text: str, tmp_path: Path) -> None:
    for name in ("tokenizer_config.json", "added_tokens.json"):
        (tmp_path / name).write_text(text if name.startswith("tok") else "[1]")
    assert warnings(tmp_path) == []
