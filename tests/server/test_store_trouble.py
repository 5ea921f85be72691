"""A store whose catalog is damaged, older or gone: what callers, health and the commands say."""

from __future__ import annotations

import shutil
import sqlite3
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc
import pytest
import typer

from adaplex.server.app import serve
from adaplex.server.cli.store import fsck, restore
from adaplex.server.config import ServerConfig
from adaplex.server.errors import ConfigError
from adaplex.server.open_store import open_contents
from adaplex.v1 import adapters_pb2
from adapters.damaged_catalog import overwrite_pages
from server.calls import until
from server.fake_model import ScriptedRunner
from server.server_rig import ServerRig, rig, toy_components

CATALOG = "catalog.sqlite3"
SERVING, NOT_SERVING = 1, 2


async def filled(folder: Path) -> Path:
    """Makes a store with one adapter; returns its folder."""
    async with rig(folder) as server:
        await server.upload("mine")
    return folder / "store"


@asynccontextmanager
async def serving(folder: Path) -> AsyncIterator[ServerRig]:
    """Yields a server whose store is not checked at the end."""
    components, engine = toy_components(folder, runner := ScriptedRunner())
    async with (
        serve(components) as server,
        grpc.aio.insecure_channel(f"127.0.0.1:{server.port}") as channel,
    ):
        yield ServerRig(server, components, engine, runner, channel)


def forget(store: Path) -> None:
    for path in store.glob(f"{CATALOG}*"):
        path.unlink()


def printed(capsys: pytest.CaptureFixture[str], command: Any, **options: Any) -> tuple[int, str]:
    """Returns the exit code and the output of a command."""
    capsys.readouterr()
    code = 0
    try:
        command(**options)
    except typer.Exit as ended:
        code = ended.exit_code
    out = capsys.readouterr()
    return code, out.out + out.err


async def test_a_damaged_page_is_named_by_the_status_and_by_health(tmp_path: Path) -> None:
    await filled(tmp_path)
    async with serving(tmp_path) as server:
        assert await server.health() == SERVING
        overwrite_pages(tmp_path / "store")
        catalog = server.components.registry.names._catalog
        with sqlite3.connect(tmp_path / "store" / CATALOG):
            catalog._reader.execute("PRAGMA shrink_memory")  # type: ignore[attr-defined]
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await server.adapters.ListAdapters(adapters_pb2.ListAdaptersRequest())
        assert caught.value.code() is grpc.StatusCode.DATA_LOSS
        details = caught.value.details() or ""
        assert "is damaged: " in details
        assert details.endswith("stop the servers of the store and run adaplex adapters restore")
        await until(lambda: not server.server._health.ready)
        assert await server.health() == NOT_SERVING
        assert await server.health("liveness") == SERVING
        assert (await server.generate()).started  # the base goes on


@pytest.mark.parametrize("remove", [forget, shutil.rmtree])
async def test_a_store_that_is_removed_is_not_serving(
    remove: Callable[[Path], None], tmp_path: Path
) -> None:
    await filled(tmp_path)
    async with serving(tmp_path) as server:
        remove(tmp_path / "store")
        await until(lambda: not server.server._health.ready)
        assert await server.health() == NOT_SERVING
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await server.adapters.DeleteAdapter(adapters_pb2.DeleteAdapterRequest(name="mine"))
        assert caught.value.code() is grpc.StatusCode.DATA_LOSS
        with pytest.raises(grpc.RpcError) as refused:
            await server.upload("other")
        assert refused.value.code() is grpc.StatusCode.DATA_LOSS  # type: ignore[attr-defined]
        assert "was removed" in refused.value.details()  # type: ignore[attr-defined]
        assert (await server.generate()).started


async def test_a_start_and_the_commands_on_a_damaged_catalog(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    store = await filled(tmp_path)
    overwrite_pages(store)
    with pytest.raises(ConfigError, match=r"is damaged: .*run adaplex adapters restore") as caught:
        open_contents(ServerConfig(store_dir=store))
    assert "\n" not in str(caught.value)
    code, said = printed(capsys, fsck, store_dir=store)
    assert (code, said.count("\n")) == (2, 1)
    code, said = printed(capsys, restore, store_dir=store)
    assert code == 0
    assert "moved the damaged catalog to " in said
    assert "restored mine\n1 names restored" in said
    assert printed(capsys, fsck, store_dir=store) == (0, "1 contents checked, 0 problems\n")


async def test_a_lost_catalog_is_told_by_fsck_and_restored(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    store = await filled(tmp_path)
    forget(store)
    code, said = printed(capsys, fsck, store_dir=store)
    assert code == 1
    assert "is new or older than its copies" in said
    assert "lost: " in said
    async with serving(tmp_path) as server:
        with pytest.raises(grpc.RpcError) as caught:
            await server.upload("mine", seed=1, replace=True)
        assert caught.value.code() is grpc.StatusCode.FAILED_PRECONDITION
        code, said = printed(capsys, restore, store_dir=store)
        assert code == 2
        assert "a server uses the store" in said
    assert printed(capsys, restore, store_dir=store)[0] == 0
    async with rig(tmp_path) as server:
        assert (await server.generate(adapter="mine")).started.adapter.name == "mine"


def test_the_names_of_a_bucket_are_not_restored_here(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tmp_path / "config.yaml"
    config.write_text("shared_store: s3://bucket/prefix\n")
    code, said = printed(capsys, restore, store_dir=tmp_path, config=config)
    assert code == 2
    assert "restore those from the bucket's own versions or backup" in said
