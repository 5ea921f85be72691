"""Two server processes on one store, a folder or a bucket: what one is told, the other serves."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from adaplex.client import Client, NotFound
from adaplex.client.local import LocalServer
from seaweed import S3Server

SOON = 1.0
"""Seconds within which the other server must know."""


@pytest.fixture(scope="module", params=["folder", "bucket"])
def pair(
    request: pytest.FixtureRequest,
    tmp_path_factory: pytest.TempPathFactory,
    tiny_model: Callable[[str], Path],
    s3: S3Server,
) -> Iterator[tuple[Client, Client]]:
    root = tmp_path_factory.mktemp(request.param)
    shared: dict[str, object] = {"shared_store": s3.prefix()} if request.param == "bucket" else {}
    with ExitStack() as stack:
        environment = stack.enter_context(pytest.MonkeyPatch.context())
        for name, value in s3.environment.items():
            environment.setenv(name, value)
        servers = [
            stack.enter_context(
                LocalServer(
                    model=tiny_model("llama"),
                    quantization="fp32",
                    threads=1,
                    store_dir=root / (f"cache{i}" if shared else "store"),
                    **shared,
                )
            )
            for i in range(2)
        ]
        for server in servers:
            server.wait_ready(120)
        one, two = (stack.enter_context(Client(server.target)) for server in servers)
        yield one, two


def digest(client: Client, adapter: str) -> str:
    answer = client.generate("hello", adapter=adapter, max_tokens=2)
    assert answer.adapter is not None
    return answer.adapter.digest


def soon(client: Client, adapter: str, expected: str) -> float:
    """Seconds until a client gets the expected content; it must be soon."""
    begun = time.monotonic()
    while True:
        try:
            found = digest(client, adapter)
        except NotFound:
            found = ""
        seconds = time.monotonic() - begun
        if found == expected:
            return seconds
        assert seconds < 10, f"still {found or 'nothing'}"


def test_what_one_is_told_the_other_serves(
    pair: tuple[Client, Client], adapters: list[Path]
) -> None:
    one, two = pair
    first = one.adapters.upload("tone", adapters[0]).adapter.digest
    assert soon(two, "tone", first) < SOON
    second = one.adapters.upload("tone", adapters[1], replace=True).adapter.digest
    assert soon(two, "tone", second) < SOON
    two.adapters.set_alias("tone", "default", 1)
    assert soon(one, "tone", first) < SOON
    assert soon(two, "tone", first) < SOON
    one.adapters.rollback("tone")
    assert soon(two, "tone", second) < SOON
    assert [a.name for a in two.adapters.list()] == ["tone"]
    kinds = [event.kind for event in two.adapters.history("tone")]
    assert kinds == ["alias", "alias", "upload", "upload"]
    two.adapters.delete("tone")
    time.sleep(SOON)
    for client in pair:
        with pytest.raises(NotFound):
            digest(client, "tone")


def test_the_same_answer_from_both(pair: tuple[Client, Client], adapters: list[Path]) -> None:
    one, _ = pair
    one.adapters.upload("same", adapters[2])
    time.sleep(SOON)
    answers = {client.generate("hello", adapter="same", max_tokens=8).token_ids for client in pair}
    plain = one.generate("hello", max_tokens=8).token_ids
    assert len(answers) == 1
    assert plain not in answers
