"""`adaplex adapters eval`: the same perplexities as transformers and PEFT on the same windows."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
from typer.testing import CliRunner

from adaplex.model.perplexity import Window, windows
from adaplex.server.evaluation import evaluate
from peft_adapters import Oracle, everything, load_plain, save_adapter
from peft_families import FAMILIES
from peft_kinds import save_kind
from tiny import byte_tokenizer

TEXT = "".join(f"Line {i}: the quick brown fox jumps over dog {i * i}.\n" for i in range(8))


def run(*arguments: object) -> Any:
    app = typer.Typer()
    app.command()(evaluate)
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text(TEXT)
    return path


def save_lora(model: Path, directory: Path) -> Path:
    fields = {"r": 4, "lora_alpha": 8, "target_modules": everything("llama")}
    return save_adapter(load_plain(model), directory, **fields)


def nats(oracle: Oracle, ids: list[int], length: int, stride: int) -> list[float]:
    """By plain windows: what is before a token in its window, then the token."""
    found = []
    for window in windows(len(ids), length, stride):
        for at in range(window.first, window.end):
            logits = oracle.logits(ids[window.start : at])
            found.append(-float(torch.log_softmax(logits, -1)[ids[at]]))
    return found


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("lora", []),
        ("prefix-tuning", []),
        ("prompt-tuning", []),
        ("ia3", ["--merged"]),
        ("OFT", []),
    ],
)
def test_perplexities_are_those_of_peft(
    name: str,
    arguments: list[str],
    text: Path,
    tiny_model: Callable[[str], Path],
    tmp_path: Path,
) -> None:
    model, directory = tiny_model("llama"), tmp_path / name
    if name == "lora":
        oracle = Oracle(load_plain(model), save_lora(model, directory))
    elif name in FAMILIES:
        oracle = FAMILIES[name].oracle(model, FAMILIES[name].save(model, directory, 2))
    else:
        save_kind(load_plain(model), directory, name)
        oracle = Oracle(load_plain(model), directory)
    result = run(
        *(directory, "--file", text, "--model", model, "--quantization", "fp32", "--json"),
        *("--window", 40, "--stride", 24, "--max-tokens", 100, *arguments),
    )
    assert result.exit_code == 0, result.output
    (score,) = json.loads(result.stdout)["texts"]
    ids = byte_tokenizer()(TEXT).input_ids[:100]
    base = nats(Oracle(load_plain(model), None), ids, 40, 24)
    adapted = nats(oracle, ids, 40, 24)
    assert score["tokens"] == len(base) == 99
    assert math.log(score["base"]) == pytest.approx(sum(base) / 99, abs=1e-4)
    assert math.log(score["adapter"]) == pytest.approx(sum(adapted) / 99, abs=1e-4)
    assert abs(score["ratio"] - 1) > 1e-3


def test_several_texts_are_shown_as_a_table(
    text: Path, tiny_model: Callable[[str], Path], tmp_path: Path
) -> None:
    other = tmp_path / "other.txt"
    other.write_text("0 1 2 3 4 5 6 7 8 9")
    directory = save_lora(tiny_model("llama"), tmp_path / "lora")
    result = run(directory, "--file", text, "--file", other, "--model", tiny_model("llama"))
    assert result.exit_code == 0, result.output
    header, first, second = result.stdout.strip().splitlines()[-3:]
    assert header.split() == ["TEXT", "TOKENS", "BASE", "ADAPTER", "ADAPTER", "/", "BASE"]
    assert first.split()[0] == str(text)
    assert second.split()[:2] == [str(other), "18"]


@pytest.mark.parametrize(
    ("content", "arguments", "reason"),
    [
        ("x", [], "has 1 tokens, at least 2 are needed"),
        ("long" * 1000, ["--window", "4000"], "window: 4000 positions"),
    ],
)
def test_what_cannot_be_measured_is_told(
    content: str,
    arguments: list[str],
    reason: str,
    tiny_model: Callable[[str], Path],
    tmp_path: Path,
) -> None:
    path = tmp_path / "text.txt"
    path.write_text(content)
    directory = save_lora(tiny_model("llama"), tmp_path / "lora")
    result = run(directory, "--file", path, "--model", tiny_model("llama"), *arguments)
    assert result.exit_code == 2
    assert reason in result.output


def test_an_adapter_that_is_refused_says_why(
    text: Path, tiny_model: Callable[[str], Path], tmp_path: Path
) -> None:
    directory = save_lora(tiny_model("llama"), tmp_path / "lora")
    config = json.loads((directory / "adapter_config.json").read_text())
    (directory / "adapter_config.json").write_text(json.dumps(config | {"r": -1}))
    result = run(directory, "--file", text, "--model", tiny_model("llama"))
    assert result.exit_code == 2
    assert "error: r: must be a positive integer" in result.output


@pytest.mark.parametrize(
    ("count", "length", "stride", "expected"),
    [
        (5, 10, 5, [Window(0, 5, 1)]),
        (10, 4, 4, [Window(0, 4, 1), Window(4, 8, 5), Window(8, 10, 9)]),
        (9, 4, 2, [Window(0, 4, 1), Window(2, 6, 4), Window(4, 8, 6), Window(6, 9, 8)]),
        (9, 4, 4, [Window(0, 4, 1), Window(4, 8, 5)]),
    ],
)
def test_windows_score_a_token_once(
    count: int, length: int, stride: int, expected: list[Window]
) -> None:
    assert list(windows(count, length, stride)) == expected
