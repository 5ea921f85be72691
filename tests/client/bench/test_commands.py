"""Every workload end to end, against a real server with a fake model, within seconds."""

from __future__ import annotations

import asyncio
import json
import sys
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from adaplex.client.bench.session import BenchConfig
from adaplex.client.cli import app
from server.fake_model import ScriptedRunner
from server.server_rig import ServerRig, rig

SMALL = ("--prompt", 6, "--output", 4)


async def run(toy: ServerRig, *arguments: object) -> Result:
    """Runs `adaplex bench` in a thread with an event loop of its own."""
    metrics = ["--metrics", f"http://127.0.0.1:{toy.server.http_port}/metrics"]
    line = ["--target", f"127.0.0.1:{toy.server.port}", "bench"]
    command, *rest = map(str, arguments)
    line += [command, *metrics, *rest]  # `rest` can override the metrics
    return await asyncio.to_thread(
        CliRunner().invoke, app, line, env={"TERM": "dumb"}, catch_exceptions=False
    )


async def reported(toy: ServerRig, folder: Path, *arguments: object) -> Any:
    """Runs a command that must succeed; returns its JSON report."""
    result = await run(toy, *arguments, "--json", folder / "report.json")
    assert result.exit_code == 0, result.stderr
    assert "TOK/S" in result.stdout
    return json.loads((folder / "report.json").read_text())


async def names(toy: ServerRig) -> list[str]:
    from adaplex.v1 import adapters_pb2

    listed = await toy.adapters.ListAdapters(adapters_pb2.ListAdaptersRequest(page_size=100))
    return [adapter.name for adapter in listed.adapters]


async def test_punica_measures_every_mix_and_leaves_no_adapter_behind(tmp_path: Path) -> None:
    paced = ScriptedRunner(slow=0.003)  # so that tokens are read one by one
    paced.gate.clear()
    async with rig(tmp_path, runner=paced) as toy:
        report = await reported(
            *(toy, tmp_path, "punica", "--streams", "1,4", "--requests", 3, *SMALL),
            *("--make-adapters", 4, "--rank", "2,4", "--bandwidth", 10),
            *("--plot", tmp_path / "report.svg"),
        )
        assert await names(toy) == []
    runs = {(run["case"]["streams"], run["case"]["mix"]): run for run in report["runs"]}
    assert len(runs) == 10
    for (streams, _), run in runs.items():
        measure = run["measure"]
        assert measure["requests"] == 3 * streams
        assert measure["output_tokens"] == 3 * streams * 4
        assert (measure["errors"], measure["attainment"]) == ({}, 1.0)
        assert measure["first_token"]["count"] == 3 * streams
        assert 0 < measure["inter_token"]["count"] <= 9 * streams
        assert run["usage"]["peak_bytes"] > 1 << 20
    base, distinct = runs[4, "base"]["roofline"], runs[4, "distinct"]["roofline"]
    assert base["step"] == {"weights": 900, "adapters": 0, "kv": 4 * 8 * 64}
    assert distinct["step"]["adapters"] > runs[4, "identical"]["roofline"]["step"]["adapters"] > 0
    assert base["bandwidth"] == 1e10
    assert base["share"] == pytest.approx(base["floor"] / base["measured"], rel=1e-3)
    assert report["server"]["model"]["name"] == "toy"
    assert report["options"]["streams"] == "1,4"
    assert b"<svg" in (tmp_path / "report.svg").read_bytes()


async def test_slora_uses_the_adapters_on_the_server(tmp_path: Path) -> None:
    async with rig(tmp_path) as toy:
        for i in range(2):
            await toy.upload(f"a{i}", seed=i)
        report = await reported(
            *(toy, tmp_path, "slora", "--rate", 20, "--duration", 1, "--alpha", 0.5),
            *("--inputs", "4:9", "--outputs", "2:5", "--bandwidth", 10),
        )
        assert await names(toy) == ["a0", "a1"]
    (run_,) = report["runs"]
    assert run_["case"]["adapters"] == 2
    assert run_["measure"]["requests"] == 20
    assert run_["measure"]["errors"] == {}
    assert run_["roofline"] is None
    assert run_["swaps"]["arena"]["loads"] == 2


async def test_slora_counts_refused_requests(tmp_path: Path) -> None:
    async with rig(tmp_path, engine={"max_waiting": 1, "max_running": 1}) as toy:
        await toy.upload("a")
        toy.runner.gate.clear()
        report = await reported(
            *(toy, tmp_path, "slora", "--rate", 100, "--duration", 0.2, "--cv", 0),
            *("--inputs", "4:5", "--outputs", "2:3", "--bandwidth", 10),
        )
    measure = report["runs"][0]["measure"]
    assert measure["errors"]["QUEUE_FULL"] == sum(measure["errors"].values()) > 0
    assert measure["attainment"] == pytest.approx(1 - measure["errors"]["QUEUE_FULL"] / 20)


async def test_churn_changes_adapters_without_an_error(tmp_path: Path) -> None:
    async with rig(tmp_path) as toy:
        report = await reported(
            *(toy, tmp_path, "churn", "--streams", 2, "--adapters", 2, "--adapter-rank", 2),
            *(*SMALL, "--seconds", 1, "--bandwidth", 10),
        )
        assert await names(toy) == []
    quiet, changed = report["runs"]
    assert (quiet["case"]["changes"], changed["case"]["changes"]) == ("no", "yes")
    assert quiet["extra"] == {}
    assert changed["extra"]["change_errors"] == {}
    assert changed["measure"]["errors"] == quiet["measure"]["errors"] == {}
    done = changed["extra"]["changes"]
    assert set(done) == {"upload", "first use", "delete", "replace", "unload"}
    assert len({kind["count"] for kind in done.values()}) == 1


async def test_the_cliff_loads_again_only_beyond_the_arena(tmp_path: Path) -> None:
    async with rig(tmp_path, engine={"arena_bytes": 1024}) as toy:
        report = await reported(
            *(toy, tmp_path, "cliff", "--times", "0.5,4", "--streams", 2, "--requests", 40),
            *(*SMALL, "--make-adapters", 40, "--rank", 2, "--bandwidth", 10),
            *("--plot", tmp_path / "cliff.png"),
        )
    small, large = (run for run in report["runs"] if run["case"]["mix"] == "uniform")
    assert small["case"]["arenas"] <= 0.5 < 3 < large["case"]["arenas"] <= 4
    assert "arena" not in small["swaps"]
    assert large["swaps"]["arena"]["loads"] > large["case"]["adapters"] / 4
    assert large["extra"] == {"arena_bytes": 1024}
    assert large["measure"]["requests"] == 40


async def test_a_cliff_without_enough_adapters_says_how_many_bytes_are_missing(
    tmp_path: Path,
) -> None:
    async with rig(tmp_path) as toy:
        result = await run(toy, "cliff", "--make-adapters", 2, "--bandwidth", 10)
        assert await names(toy) == []
    assert result.exit_code == 1
    assert "adapters: there are 2 of 4,096 bytes, too few to fill 32,768 bytes" in result.stderr


async def test_a_hot_tenant_is_measured_beside_the_cold_ones(tmp_path: Path) -> None:
    async with rig(tmp_path) as toy:
        report = await reported(
            *(toy, tmp_path, "hot-tenant", "--tenants", 2, "--rate", 10, "--flood", 3),
            *(*SMALL, "--seconds", 1, "--make-adapters", 3, "--rank", 2, "--bandwidth", 10),
        )
    alone, flooded = report["runs"]
    assert (alone["case"]["flood"], flooded["case"]["flood"]) == (0, 3)
    assert alone["measure"]["requests"] == flooded["measure"]["requests"] == 10
    assert alone["extra"] == {}
    assert flooded["extra"]["hot"]["requests"] > 0
    assert flooded["extra"]["hot"]["errors"] == {}


async def test_too_few_adapters_are_an_error_that_says_what_to_do(tmp_path: Path) -> None:
    async with rig(tmp_path) as toy:
        await toy.upload("a")
        result = await run(toy, "punica", "--streams", 4, "--bandwidth", 10)
    assert result.exit_code == 1
    assert "adapters: 4 are needed, and there are 1" in result.stderr
    assert "--make-adapters 4" in result.stderr


async def test_lengths_beyond_the_servers_are_refused_before_any_load(tmp_path: Path) -> None:
    async with rig(tmp_path) as toy:
        await toy.upload("a")
        result = await run(toy, "slora", "--bandwidth", 10)
        assert toy.engine.stats().running == 0
    assert result.exit_code == 1
    assert "lengths: inputs below 512 and outputs below 512 tokens do not fit" in result.stderr


async def test_missing_metrics_and_psutil_are_warnings(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "psutil", None)
    async with rig(tmp_path) as toy:
        report = await reported(
            *(toy, tmp_path, "punica", "--streams", 1, "--mixes", "base", *SMALL),
            *("--bandwidth", 10, "--metrics", "http://127.0.0.1:1/metrics"),
        )
    assert [warning.split(":")[0] for warning in report["warnings"]] == [
        "no processor time and memory of the server",
        "no swap times",
    ]
    assert report["runs"][0]["usage"] is report["runs"][0]["swaps"] is None


async def test_a_plot_without_matplotlib_is_refused_before_any_load(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    async with rig(tmp_path) as toy:
        result = await run(toy, "punica", "--plot", tmp_path / "x.svg", "--make-adapters", 1)
        assert await names(toy) == []
    assert result.exit_code == 1
    assert "a plot needs matplotlib: pip install 'adaplex[bench]'" in result.stderr


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["punica", "--streams", "1,x"], "is not numbers above zero"),
        (["punica", "--streams", "0"], "is not numbers above zero"),
        (["punica", "--mixes", "base,skewed"], "skewed: not one of base"),
        (["slora", "--inputs", "9:9"], "is not low:high"),
        (["cliff", "--times", "nan"], "is not numbers above zero"),
    ],
)
def test_wrong_usage_is_named(arguments: list[str], complaint: str) -> None:
    result = CliRunner().invoke(app, ["bench", *arguments], env={"TERM": "dumb", "COLUMNS": "200"})
    assert result.exit_code == 2
    assert complaint in result.stderr


def test_only_a_loopback_target_is_local() -> None:
    assert BenchConfig("127.0.0.1:50051").local
    assert BenchConfig("[::1]:50051").local
    assert not BenchConfig("10.0.0.1:50051").local
