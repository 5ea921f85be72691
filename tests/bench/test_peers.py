"""The comparison with peers, driven with fakes: nothing is installed, no server started."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from pathlib import Path
from typing import Self

import pytest

from bench.peers import install, report, rounds
from bench.peers.events import post
from bench.peers.system import PeerError, ReportProgress, StreamResult
from bench.peers.workload import CELLS, CONTEXT, GOALS, SLOTS, Cell

SMALL = (Cell("2-base", (None, None), 4, 3), Cell("2-distinct", (0, 1), 4, 3))
PREFILL = Cell("prefill", (0,), 10, 1)


class Fake:
    """Answers after `seconds` with tokens that tell prompt and adapter."""

    def __init__(self, name: str, seconds: float = 0.0, short: int = 0, deaf: bool = False) -> None:
        self.name = name
        self.running = False
        self.starts = 0
        self.asked: list[tuple[tuple[int, ...], int | None, int]] = []
        self._seconds, self._short, self._deaf = seconds, short, deaf

    def prepare(self, progress: ReportProgress) -> None:
        progress(f"{self.name} is there")

    async def __aenter__(self) -> Self:
        self.running = True
        self.starts += 1
        return self

    async def __aexit__(self, *_: object) -> None:
        self.running = False

    async def generate(
        self, prompt: Sequence[int], adapter: int | None, tokens: int
    ) -> StreamResult:
        assert self.running
        self.asked.append((tuple(prompt), adapter, tokens))
        await asyncio.sleep(self._seconds)
        heard = None if self._deaf else adapter
        return StreamResult(f"{prompt} {heard}", tokens - self._short, 0.5, 1.0)


class Missing(Fake):
    def prepare(self, progress: ReportProgress) -> None:
        raise PeerError("no compiler")


async def measured(*systems: Fake, repeats: int = 1) -> rounds.Results:
    found, said = rounds.Results(), list[str]()
    rounds.prepare(systems, found, said.append)
    await rounds.run(systems, SMALL, repeats, found, said.append)
    assert not any(system.running for system in systems)
    return found


def test_no_prompt_comes_twice() -> None:
    seen = [
        tuple(prompt) for cell in CELLS for seed in range(-4, 3) for prompt in cell.prompts(seed)
    ]
    assert len(set(seen)) == len(seen)


def test_all_systems_get_the_same_prompts() -> None:
    assert CELLS[0].prompts(7) == CELLS[0].prompts(7)
    assert CELLS[0].prompts(7) != CELLS[0].prompts(8)


def test_every_stream_fits_a_slot() -> None:
    assert all(cell.prompt + cell.output <= CONTEXT for cell in CELLS)
    assert all(len(cell.adapters) <= SLOTS for cell in CELLS)


def test_goals_name_cells_that_are_measured() -> None:
    assert {goal.cell for goal in GOALS} <= {cell.name for cell in CELLS}


def test_a_prefill_cell_counts_prompt_tokens() -> None:
    assert PREFILL.counted == 10
    assert SMALL[0].counted == 6


async def test_every_system_answers_every_cell_in_every_round() -> None:
    quick, slow = Fake("adaplex"), Fake("peer", seconds=0.01)
    found = await measured(quick, slow, repeats=3)
    assert {cell: len(values) for cell, values in found.figures["peer"].items()} == {
        "2-base": 3,
        "2-distinct": 3,
    }
    assert (quick.starts, slow.starts) == (3, 3)
    assert sorted(map(str, quick.asked)) == sorted(map(str, slow.asked))
    assert not found.missing


async def test_measured_prompts_are_not_those_of_the_warm_up() -> None:
    system = Fake("adaplex")
    await measured(system, repeats=2)
    prompts = [prompt for prompt, _, tokens in system.asked if tokens != rounds.CHECK.output]
    assert len(set(prompts)) == len(prompts)


def test_each_round_begins_with_another_system() -> None:
    systems = [Fake("a"), Fake("b"), Fake("c")]
    orders = ["".join(s.name for s in rounds.turned(systems, number)) for number in range(4)]
    assert orders == ["abc", "bca", "cab", "abc"]


async def test_a_system_that_cannot_be_installed_is_missing_with_its_reason() -> None:
    there, missing = Fake("adaplex"), Missing("vllm")
    found = await measured(there, missing)
    assert found.missing == {"vllm": "no compiler"}
    assert missing.starts == 0
    lines = report.text(["adaplex", "vllm"], SMALL, (), found).splitlines()
    assert lines[-1] == "missing: vllm: no compiler"
    assert lines[1].split()[2:] == ["-", "-"]


async def test_a_system_that_ignores_adapters_is_refused() -> None:
    found = await measured(Fake("deaf", deaf=True), repeats=2)
    assert "answer like another" in found.missing["deaf"]
    assert not found.figures


async def test_an_answer_of_another_length_is_refused() -> None:
    found = await measured(Fake("short", short=1))
    assert found.missing["short"] == "2-base: 2 tokens generated, 3 asked"


TABLE = {
    "adaplex": {"16-one": 600.0},
    "llama.cpp-bf16": {"16-one": 400.0, "16-base": 500.0},
    "llama.cpp-q8_0": {"16-one": 300.0},
}


def test_ratios_are_to_the_better_file_type() -> None:
    assert report.ratio(TABLE, "llama.cpp", "16-one") == 1.5
    assert report.ratio(TABLE, "llama.cpp-q8_0", "16-one") == 2.0
    assert report.ratio(TABLE, "llama.cpp", "16-base") is None
    assert report.ratio(TABLE, "vllm", "16-one") is None


def test_figures_are_medians() -> None:
    assert report.medians({"a": {"c": [1.0, 90.0, 3.0]}}) == {"a": {"c": 3.0}}


def test_the_table_has_figures_ratios_and_goals() -> None:
    found = rounds.Results()
    for system, cells in TABLE.items():
        for cell, figure in cells.items():
            found.figures[system][cell].append(figure)
    cells = [cell for cell in CELLS if cell.name == "16-one"]
    head, row, *goals = report.text(list(TABLE), cells, GOALS, found).splitlines()
    assert head.split() == ["tok/s", *TABLE, "adaplex/llama.cpp"]
    assert row.split() == ["16-one", "600", "400", "300", "1.50"]
    assert goals == ["16-one: 1.50 times llama.cpp, 1.2 wanted: reached"]
    assert report.record(cells, found)["ratios"] == {"llama.cpp": {"16-one": 1.5}}


@pytest.mark.parametrize("chunked", [True, False])
async def test_events_may_be_cut_anywhere(chunked: bool) -> None:
    parts = [b'data: {"a"', b": 1}\n\nda", b'ta: {"a": 2}\n\n', b"data: [DONE]\n\n"]

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        coding = b"Transfer-Encoding: chunked\r\n" if chunked else b""
        writer.write(b"HTTP/1.1 200 OK\r\n" + coding + b"\r\n")
        for part in [*parts, b""] if chunked else parts:
            writer.write(b"%x\r\n%s\r\n" % (len(part), part) if chunked else part)
        await writer.drain()
        writer.close()

    async with await asyncio.start_server(answer, "127.0.0.1", 0) as server:
        port = server.sockets[0].getsockname()[1]
        assert [event async for event in post(port, "/x", {})] == [{"a": 1}, {"a": 2}]


async def test_a_status_that_is_no_success_is_an_error_with_its_text() -> None:
    async def refuse(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 400 Bad Request\r\n\r\nno such adapter")
        await writer.drain()
        writer.close()

    async with await asyncio.start_server(refuse, "127.0.0.1", 0) as server:
        port = server.sockets[0].getsockname()[1]
        with pytest.raises(PeerError, match="status 400: no such adapter"):
            await anext(post(port, "/x", {}))


def test_an_installation_is_made_once_and_again_for_another_recipe(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ADAPLEX_CACHE", str(tmp_path))
    made: list[Path] = []
    for recipe in ("one", "one", "two"):
        install._made("peer", recipe, made.append, lambda line: None)
    assert made == [tmp_path / "peers" / "peer"] * 2


def test_a_failed_installation_is_tried_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ADAPLEX_CACHE", str(tmp_path))

    def fail(target: Path) -> None:
        (target / "half").touch()
        install._run(target, ["python3", "-c", "print('gone'); raise SystemExit(3)"])

    for _ in range(2):
        with pytest.raises(PeerError, match="gone"):
            install._made("peer", "one", fail, lambda line: None)
    install._made("peer", "one", lambda target: None, lambda line: None)
    assert not (tmp_path / "peers" / "peer" / "half").exists()
