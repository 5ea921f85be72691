from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from typer.testing import CliRunner

from adaplex.model.base.cache_folder import Use
from adaplex.server.cli.cache import app


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for used, name in enumerate(("models/m/model.safetensors", "quantized/base", "kernels/k.so")):
        (tmp_path / name).parent.mkdir(parents=True)
        (tmp_path / name).write_bytes(b"x" * 2048)
        os.utime(tmp_path / name, (used, used))
    monkeypatch.setenv("ADAPLEX_CACHE", str(tmp_path))
    return tmp_path


def test_list_shows_each_entry_and_the_limit(cache: Path) -> None:
    use = Use([cache / "kernels/k.so"])
    result = CliRunner().invoke(app, ["list"], env={"ADAPLEX_MAX_CACHE_BYTES": "1MiB"})
    rows = [line.split() for line in result.output.splitlines()]
    assert [row[:4] for row in rows if row[0] in ("quantized", "kernels", "models")] == [
        ["models", "m", "2.0", "KiB"],
        ["quantized", "base", "2.0", "KiB"],
        ["kernels", "k.so", "2.0", "KiB"],
    ]
    assert "4.0 KiB of 1.0 MiB (max_cache_bytes)" in result.output
    assert [row[-1] for row in rows if row[0] == "kernels"] == ["yes"]
    listed = json.loads(CliRunner().invoke(app, ["list", "--json"]).output)
    assert {entry["kind"]: entry["in_use"] for entry in listed} == {
        "models": False,
        "quantized": False,
        "kernels": True,
    }
    del use


def test_clear_leaves_models_and_files_in_use(cache: Path) -> None:
    use = Use([cache / "kernels/k.so"])
    result = CliRunner().invoke(app, ["clear"])
    assert result.stdout == f"removed 1 of {cache}: 2.0 KiB\n"
    assert result.stderr == f"left: {cache / 'kernels/k.so'}: in use\n"
    del use
    kinds = ["--kind", "kernels", "--kind", "models"]
    result = CliRunner().invoke(app, ["clear", "--cache", str(cache), *kinds])
    assert result.stdout == f"removed 2 of {cache}: 4.0 KiB\n"


def test_an_unknown_kind_and_a_bad_file_are_refused(cache: Path) -> None:
    result = CliRunner().invoke(app, ["clear", "--kind", "all"])
    assert result.exit_code == 2
    assert "'all' is not one of quantized, kernels, models" in result.stderr
    result = CliRunner().invoke(app, ["list", "--config", str(cache / "none.yaml")])
    assert result.exit_code == 2
    assert result.stderr.startswith("error: config: no such file")
