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

from adaplex.adapters.registry.registry import AdapterRegistry
from adaplex.adapters.storage.alias_split import Target
from adaplex.model.base.loader import BaseModel, load_base
from adaplex.model.perplexity import Window, windows
from adaplex.server.cli.eval import evaluate
from adaplex.server.config import ServerConfig
from adaplex.server.open_store import import_adapters, open_store
from adapters.handmade import UPLOAD
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


def store(
    base: BaseModel, root: Path, **adapters: tuple[Path, ...]
) -> tuple[AdapterRegistry, list[str]]:
    """Returns a store with these versions of these names, and their digests."""
    opened = open_store(ServerConfig(store_dir=root), base.spec, element_bytes=4)
    digests = []
    for name, versions in adapters.items():
        for directory in versions:
            config = ServerConfig(adapters={name: directory})
            import_adapters(config, opened, lambda _: None)
            digests.append(opened.registry.names.get(name).digest)
    return opened.registry, digests


def nats(oracle: Oracle, ids: list[int], length: int, stride: int) -> list[float]:
    """Returns the loss of each token, given the tokens before it in its window."""
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


def test_a_stored_adapter_is_measured_by_any_of_its_names(
    text: Path, tiny_model: Callable[[str], Path], tmp_path: Path
) -> None:
    model, base = tiny_model("llama"), load_base(str(tiny_model("llama")), quantization="fp32")
    first = save_lora(model, tmp_path / "first")
    second = FAMILIES["ia3"].save(model, tmp_path / "second", 2)
    registry, digests = store(base, tmp_path / "store", tone=(first, second))
    registry.names.set_alias("tone", "best", [Target(1)], UPLOAD)
    registry.close()
    flags = ("--file", text, "--model", model, "--quantization", "fp32", "--max-tokens", 40)

    def measured(adapter: object) -> Any:
        where = () if Path(str(adapter)).is_dir() else ("--store-dir", tmp_path / "store")
        result = run(adapter, *flags, *where, "--json")
        assert result.exit_code == 0, result.output
        return json.loads(result.stdout)

    for number, directory, selectors in (
        (1, first, ("tone@1", "tone@best", digests[0])),
        (2, second, ("tone", "tone@2", digests[1])),
    ):
        expected = measured(directory)
        assert abs(expected["texts"][0]["ratio"] - 1) > 1e-3
        for selector in selectors:
            found = measured(selector)
            assert found["texts"] == expected["texts"]
            assert found["adapter"] == expected["adapter"] | {"name": f"tone@{number}"}


@pytest.mark.parametrize(
    ("adapter", "store_dir", "reason"),
    [
        ("tone", "none", "store_dir: there is no store in "),
        ("tone", "store", "no adapter 'tone'"),
        ("./tone", "store", "./tone: there is no such directory, and no adapter has such a name"),
    ],
)
def test_an_adapter_that_is_nowhere_is_told(
    adapter: str,
    store_dir: str,
    reason: str,
    text: Path,
    tiny_model: Callable[[str], Path],
    tmp_path: Path,
) -> None:
    (tmp_path / "store").mkdir()
    flags = ("--model", tiny_model("llama"), "--store-dir", tmp_path / store_dir)
    result = run(adapter, "--file", text, *flags)
    assert result.exit_code == 2
    assert f"error: {reason}" in result.output
    assert not (tmp_path / "none").exists()


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


def test_rounded_activations_are_measured_beside_exact_ones(
    text: Path, tiny_model: Callable[[str], Path], tmp_path: Path
) -> None:
    directory = save_lora(tiny_model("llama"), tmp_path / "lora")
    flags = (directory, "--file", text, "--model", tiny_model("llama"), "--max-tokens", 100)

    def measured(activations: str) -> Any:
        result = run(*flags, "--cpu-activations", activations, "--json")
        assert result.exit_code == 0, result.output
        found = json.loads(result.stdout)
        assert found["cpu_activations"] == activations
        return found["texts"][0]

    exact, rounded = measured("float"), measured("int8")
    assert exact["base_in_float"] is None
    for model in ("base", "adapter"):
        assert rounded[f"{model}_in_float"] == exact[model]
        assert rounded[model] != exact[model]
        assert rounded[model] == pytest.approx(exact[model], rel=0.02)
    table = run(*flags, "--cpu-activations", "int8").stdout.strip().splitlines()
    assert table[-2].endswith("BASE IN FLOAT  ADAPTER IN FLOAT")
    assert table[-1].split()[-2:] == [f"{exact[model]:.3f}" for model in ("base", "adapter")]


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
