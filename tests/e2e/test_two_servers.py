"""Two server processes on one store, a folder or a bucket: each serves what the other changed."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from adaplex.client import Client, NotFound
from adaplex.client.local import LocalServer
from seaweed import S3Server
from time_limits import WAIT_SECONDS

SOON = 1.0
"""A request that begins this many seconds after a change sees the change, on both servers."""


@pytest.fixture(scope="module", params=["folder", pytest.param("bucket", marks=pytest.mark.slow)])
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
            server.wait_ready(WAIT_SECONDS)
        one, two = (stack.enter_context(Client(server.target)) for server in servers)
        yield one, two


def digest(client: Client, adapter: str) -> str:
    """Returns the digest of the adapter that answers; empty if there is none of the name."""
    try:
        answer = client.generate("hello", adapter=adapter, max_tokens=2)
    except NotFound:
        return ""
    assert answer.adapter is not None
    return answer.adapter.digest


def wait_served(client: Client, adapter: str, expected: str) -> None:
    """Generates until the answer has the expected digest. Fails if a request that begins later than
    SOON has another one.
    """
    changed = time.monotonic()
    while True:
        began = time.monotonic()
        if (found := digest(client, adapter)) == expected:
            return
        assert began - changed < SOON, f"still {found or 'not found'}"


def test_both_servers_serve_what_either_changed(
    pair: tuple[Client, Client], adapters: list[Path]
) -> None:
    one, two = pair
    first = one.adapters.upload("tone", adapters[0]).adapter.digest
    wait_served(two, "tone", first)
    second = one.adapters.upload("tone", adapters[1], replace=True).adapter.digest
    wait_served(two, "tone", second)
    two.adapters.set_alias("tone", "default", 1)
    wait_served(one, "tone", first)
    wait_served(two, "tone", first)
    one.adapters.rollback("tone")
    wait_served(two, "tone", second)
    assert [a.name for a in two.adapters.list()] == ["tone"]
    kinds = [event.kind for event in two.adapters.history("tone")]
    assert kinds == ["alias", "alias", "upload", "upload"]
    two.adapters.delete("tone")
    for client in pair:
        wait_served(client, "tone", "")


def test_both_servers_give_the_same_answer(
    pair: tuple[Client, Client], adapters: list[Path]
) -> None:
    one, two = pair
    wait_served(two, "same", one.adapters.upload("same", adapters[2]).adapter.digest)
    answers = {client.generate("hello", adapter="same", max_tokens=8).token_ids for client in pair}
    plain = one.generate("hello", max_tokens=8).token_ids
    assert len(answers) == 1
    assert plain not in answers
