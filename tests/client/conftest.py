from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterator
from inspect import isasyncgen, isawaitable, isgenerator
from operator import attrgetter
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from adaplex.client import AsyncClient, Client, Generation, GenerationEvent
from adaplex.client.cli import app
from client.fake_server import FakeServer


class Blocking:
    """Drives a Client by method paths."""

    def __init__(self, target: str, **options: Any) -> None:
        self.client = Client(target, **options)

    def __call__(self, method: str, /, *args: Any, **keywords: Any) -> Any:
        """Calls a method by its path; returns an iterator's items as a list."""
        result = attrgetter(method)(self.client)(*args, **keywords)
        return list(result) if isgenerator(result) else result

    def stream(self, *args: Any, **keywords: Any) -> tuple[list[GenerationEvent], Generation]:
        with self.client.stream(*args, **keywords) as stream:
            return list(stream), stream.generation

    def close(self) -> None:
        self.client.close()


class Asyncio:
    """Drives an AsyncClient on its own event loop, with the interface of Blocking."""

    def __init__(self, target: str, **options: Any) -> None:
        self.runner = asyncio.Runner()

        async def connect() -> AsyncClient:
            return AsyncClient(target, **options)

        self.client = self.runner.run(connect())

    def __call__(self, method: str, /, *args: Any, **keywords: Any) -> Any:
        async def run() -> Any:
            result = attrgetter(method)(self.client)(*args, **keywords)
            if isasyncgen(result):
                return await _collected(result)
            return await result if isawaitable(result) else result

        return self.runner.run(run())

    def stream(self, *args: Any, **keywords: Any) -> tuple[list[GenerationEvent], Generation]:
        async def run() -> tuple[list[GenerationEvent], Generation]:
            async with self.client.stream(*args, **keywords) as stream:
                return await _collected(stream), stream.generation

        return self.runner.run(run())

    def close(self) -> None:
        self.runner.run(self.client.close())
        self.runner.close()


async def _collected(items: AsyncIterator[Any]) -> list[Any]:
    return [item async for item in items]


@pytest.fixture
def server() -> Iterator[FakeServer]:
    with FakeServer() as server:
        yield server


@pytest.fixture(params=[Blocking, Asyncio], ids=["sync", "asyncio"])
def connect(request: pytest.FixtureRequest) -> Iterator[Callable[..., Any]]:
    """A function that opens a driver of either client, so that tests run with both."""
    opened: list[Any] = []

    def open_driver(target: str, **options: Any) -> Any:
        opened.append(request.param(target, **options))
        return opened[-1]

    yield open_driver
    for driver in opened:
        driver.close()


@pytest.fixture
def call(connect: Callable[..., Any], server: FakeServer) -> Any:
    return connect(server.target)


@pytest.fixture
def adapter_directory(tmp_path: Path) -> Path:
    """An adapter of more than two chunks, beside files that must not be uploaded."""
    directory = tmp_path / "tone"
    directory.mkdir()
    (directory / "adapter_config.json").write_bytes(b'{"peft_type": "LORA"}')
    pattern = bytes(range(251))
    content = (pattern * (1 + (5 << 19) // 251))[: 5 << 19]
    (directory / "adapter_model.safetensors").write_bytes(content)
    (directory / "README.md").write_text("about")
    (directory / "training_args.bin").write_bytes(b"pickle")
    return directory


@pytest.fixture
def run(server: FakeServer) -> Callable[..., Result]:
    """A function that runs the command line against the fake server."""

    def invoke(*arguments: object, text: str | None = None) -> Result:
        line = ["--target", server.target, *map(str, arguments)]
        return CliRunner().invoke(app, line, input=text, env={"TERM": "dumb"})

    return invoke
