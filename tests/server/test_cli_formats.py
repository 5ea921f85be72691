"""Offline commands for adapters: their registration, `formats` and `verify`."""

from __future__ import annotations

import json
import tomllib
from collections.abc import Callable
from importlib import import_module
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from adaplex.adapters.formats import table
from adaplex.server.cli import formats
from peft_adapters import everything, load_plain, save_adapter
from peft_families import FAMILIES
from peft_kinds import save_kind

PROJECT = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]
POINTS = [
    place
    for group, points in PROJECT["entry-points"].items()
    if group.startswith("adaplex.")
    for place in points.values()
]


@pytest.mark.parametrize("place", POINTS)
def test_every_registered_command_is_there(place: str) -> None:
    module, _, name = place.partition(":")
    assert callable(getattr(import_module(module), name))


def test_formats_prints_every_family() -> None:
    app = typer.Typer()
    app.command()(formats.formats)
    shown = CliRunner().invoke(app).stdout
    listed = json.loads(CliRunner().invoke(app, ["--json"]).stdout)
    assert len(listed) == len(table.rows())
    for row in listed:
        assert row["checkpoint"].split()[-1] in shown
        assert bool(row["primitives"]) == bool(row["family"])


def test_a_directory_is_explained_without_a_server(
    tiny_model: Callable[[str], Path], tmp_path: Path
) -> None:
    model = tiny_model("qwen2")
    fields = {"r": 4, "lora_alpha": 8, "target_modules": everything("qwen2"), "bias": "all"}
    directory = save_adapter(load_plain(model), tmp_path, **fields)
    checked = formats.verify(directory, str(model), "fp32")
    assert checked.valid
    assert checked.report.family == "lora"
    assert len(checked.report.modules) == 21
    assert {m.primitives for m in checked.report.modules} >= {("low-rank",), ("low-rank", "bias")}
    assert checked.report.packed_bytes > 0


def test_leading_positions_and_merging_are_told(
    tiny_model: Callable[[str], Path], tmp_path: Path
) -> None:
    model = tiny_model("llama")
    prefix = FAMILIES["prefix-tuning"].save(model, tmp_path / "prefix", 2)
    assert formats.verify(prefix, str(model), "fp32").report.prefix_tokens > 0
    save_kind(load_plain(model), tmp_path / "oft", "OFT")
    report = formats.verify(tmp_path / "oft", str(model), "fp32").report
    assert report.merged_only
    assert report.merged_bytes == 3 * 4 * (
        64 * 64 + 32 * 64 + 64 * 128
    )  # q, v and down of 3 layers


def test_what_would_be_refused_is_told(tiny_model: Callable[[str], Path], tmp_path: Path) -> None:
    model = tiny_model("llama")
    fields = {"r": 300, "lora_alpha": 8, "target_modules": ["q_proj"]}
    directory = save_adapter(load_plain(model), tmp_path, **fields)
    checked = formats.verify(directory, str(model), "fp32")
    assert not checked.valid
    assert "the limit is 256" in checked.report.refusals[0].reason
    config = json.loads((directory / "adapter_config.json").read_text())
    (directory / "adapter_config.json").write_text(json.dumps(config | {"peft_type": "XLORA"}))
    (refusal,) = formats.verify(directory, str(model), "fp32").report.refusals
    assert refusal.where == "peft_type"
    assert "needs a router" in refusal.reason
