from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import grpc
import pytest

from adaplex.v1.adapters_pb2 import (
    AdapterChunk,
    AdapterUpload,
    GetAdapterRequest,
    ListAdaptersRequest,
    UploadAdapterRequest,
    ValidateAdapterRequest,
)
from server.adapter_uploads import adapter_files, upload_messages
from server.calls import status, until
from server.server_rig import rig

MIB = 1 << 20


async def test_an_uploaded_adapter_is_stored_listed_and_used(tmp_path: Path) -> None:
    files = adapter_files()
    async with rig(tmp_path) as toy:
        done = await toy.send("UploadAdapter", upload_messages(files, name="german"))
        assert done.created
        assert (done.adapter.name, done.adapter.version, done.adapter.family) == (
            "german",
            1,
            "lora",
        )
        assert done.adapter.stored_bytes >= sum(map(len, files.values()))
        assert not done.adapter.resident
        assert done.report.digest == done.adapter.digest
        assert len(done.report.modules) == done.adapter.modules
        assert not done.report.refusals

        await toy.generate("x", adapter="german")
        got = await toy.adapters.GetAdapter(GetAdapterRequest(name="german"))
        assert got.adapter.resident
        assert got.adapter.digest == done.adapter.digest
        assert got.report == done.report
        listed = await toy.adapters.ListAdapters(ListAdaptersRequest())
        assert [a.name for a in listed.adapters] == ["german"]
        assert listed.next_page_token == ""


async def test_the_same_content_again_creates_nothing(tmp_path: Path) -> None:
    async with rig(tmp_path) as toy:
        first = await toy.upload("a")
        again = await toy.upload("a")
    assert (first.created, again.created) == (True, False)
    assert again.adapter.version == 1


async def test_other_content_under_a_taken_name_needs_the_replace_policy(tmp_path: Path) -> None:
    async with rig(tmp_path) as toy:
        await toy.upload("a", seed=1)
        code, details = await status(toy.upload("a", seed=2))
        assert code is grpc.StatusCode.ALREADY_EXISTS
        assert details["ErrorInfo"].reason == "ADAPTER_EXISTS"
        second = await toy.upload("a", seed=2, replace=True)
        assert second.adapter.version == 2
        old = await toy.generate("x", adapter="a@1")
        new = await toy.generate("x", adapter="a")
    assert (old.started.adapter.version, new.started.adapter.version) == (1, 2)
    assert old.started.adapter.digest != new.started.adapter.digest


async def test_the_name_of_the_base_is_taken(tmp_path: Path) -> None:
    async with rig(tmp_path) as toy:
        code, _ = await status(toy.upload("toy"))
    assert code is grpc.StatusCode.ALREADY_EXISTS


async def test_a_dry_run_reports_and_stores_nothing(tmp_path: Path) -> None:
    good = upload_messages(adapter_files(), message=ValidateAdapterRequest)
    files = adapter_files()
    files["adapter_config.json"] = b"{"
    bad = upload_messages(files, message=ValidateAdapterRequest)
    async with rig(tmp_path) as toy:
        report = await toy.send("ValidateAdapter", good)
        assert report.valid
        assert len(report.report.modules) == report_modules(report)
        report = await toy.send("ValidateAdapter", bad)
        assert not report.valid
        assert report.report.refusals[0].where.startswith("adapter_config.json")
        listed = await toy.adapters.ListAdapters(ListAdaptersRequest())
    assert not listed.adapters


def report_modules(report: Any) -> int:
    return sum(1 for module in report.report.modules if module.rank == 2)


async def test_a_bad_checkpoint_is_refused_with_every_reason(tmp_path: Path) -> None:
    files = adapter_files()
    files["adapter_config.json"] = b"{"
    async with rig(tmp_path) as toy:
        code, details = await status(toy.send("UploadAdapter", upload_messages(files)))
        count = (await toy.adapters.ListAdapters(ListAdaptersRequest())).adapters
    assert code is grpc.StatusCode.INVALID_ARGUMENT
    assert details["ErrorInfo"].reason == "ADAPTER_INVALID"
    assert details["BadRequest"].field_violations[0].field.startswith("adapter_config.json")
    assert not count


def metadata(**fields: Any) -> UploadAdapterRequest:
    return UploadAdapterRequest(metadata=AdapterUpload(**fields))


def chunk(index: int, offset: int, data: bytes) -> UploadAdapterRequest:
    part = AdapterChunk(file_index=index, offset=offset, data=data)
    return UploadAdapterRequest(chunk=part)


MESSAGES = upload_messages(adapter_files())
START = MESSAGES[0]
CONFIG_BYTES = START.metadata.files[0].size_bytes
BROKEN = {
    "no metadata": ("metadata", [MESSAGES[1]]),
    "nothing": ("metadata", []),
    "many files": (
        "metadata.files",
        [metadata(name="a", files=[START.metadata.files[0]] * 17)],
    ),
    "metadata twice": ("metadata", [START, START]),
    "an empty message": ("metadata", [START, UploadAdapterRequest()]),
    "a bad name": ("name", [metadata(name="../x")]),
    "an empty name": ("name", [metadata()]),
    "an unknown policy": ("metadata.policy", [metadata(name="a", policy=7)]),
    "another file first": ("chunk.file_index", [START, chunk(1, 0, b"x")]),
    "a gap": ("chunk.offset", [START, chunk(0, 1, b"x")]),
    "a repeat": ("chunk.offset", [START, chunk(0, 0, b"x"), chunk(0, 0, b"x")]),
    "an empty chunk": ("chunk.data", [START, chunk(0, 0, b"")]),
    "a chunk too large": ("chunk.data", [START, chunk(0, 0, bytes(MIB + 1))]),
    "more than announced": ("chunk.data", [START, chunk(0, 0, bytes(CONFIG_BYTES + 1))]),
    "more after the end": ("chunk.file_index", [*MESSAGES, chunk(2, 0, b"x")]),
    "less than announced": ("chunk", MESSAGES[:-1]),
}


@pytest.mark.parametrize("case", BROKEN)
async def test_a_broken_upload_is_refused_by_name_and_leaves_nothing(
    tmp_path: Path, case: str
) -> None:
    field, messages = BROKEN[case]
    async with rig(tmp_path) as toy:
        code, details = await status(toy.send("UploadAdapter", messages))
        assert code is grpc.StatusCode.INVALID_ARGUMENT
        assert [v.field for v in details["BadRequest"].field_violations] == [field]
        assert (await toy.upload("a")).created


async def test_content_that_does_not_match_its_hash_is_refused(tmp_path: Path) -> None:
    messages = [UploadAdapterRequest.FromString(m.SerializeToString()) for m in MESSAGES]
    messages[0].metadata.files[1].sha256 = "0" * 64
    async with rig(tmp_path) as toy:
        code, details = await status(toy.send("UploadAdapter", messages))
    assert code is grpc.StatusCode.INVALID_ARGUMENT
    assert "adapter_model.safetensors" in str(details["BadRequest"])


async def test_an_adapter_over_the_limit_is_refused_before_its_bytes_are_read(
    tmp_path: Path,
) -> None:
    async def announced_only() -> Any:
        yield START
        await asyncio.Event().wait()

    async with rig(tmp_path, max_adapter_bytes=500) as toy:
        code, details = await status(toy.adapters.UploadAdapter(announced_only()))
    assert code is grpc.StatusCode.INVALID_ARGUMENT
    assert details["ErrorInfo"].reason == "ADAPTER_TOO_LARGE"


async def test_a_silent_upload_is_ended(tmp_path: Path) -> None:
    async def silent() -> Any:
        yield START
        await asyncio.Event().wait()

    async with rig(tmp_path, upload_idle_timeout=0.05) as toy:
        code, details = await status(toy.adapters.UploadAdapter(silent()))
    assert code is grpc.StatusCode.DEADLINE_EXCEEDED
    assert details["ErrorInfo"].reason == "UPLOAD_IDLE"


async def test_uploads_are_bounded_and_a_cancelled_one_frees_its_place(tmp_path: Path) -> None:
    begun, end = asyncio.Event(), asyncio.Event()

    async def slow() -> Any:
        yield START
        begun.set()
        await end.wait()

    async with rig(tmp_path, max_uploads=1) as toy:
        call = toy.adapters.UploadAdapter(slow())
        await begun.wait()
        await until(lambda: len(toy.server._edge.inflight) == 1)
        code, details = await status(toy.upload("a"))
        assert code is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert details["ErrorInfo"].reason == "UPLOADS_BUSY"
        assert details["RetryInfo"].retry_delay.ToTimedelta().total_seconds() > 0
        call.cancel()
        await until(lambda: len(toy.server._edge.inflight) == 0)
        assert (await toy.upload("a")).created
