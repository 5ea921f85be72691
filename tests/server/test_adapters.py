from __future__ import annotations

import asyncio
import threading
from pathlib import Path
from typing import Any

import grpc
import pytest

from adaplex.v1 import adapters_pb2
from adaplex.v1.adapters_pb2 import (
    AdapterChunk,
    AdapterUpload,
    DeleteAdapterRequest,
    GetAdapterRequest,
    ListAdaptersRequest,
    LoadAdapterRequest,
    UnloadAdapterRequest,
    UploadAdapterRequest,
    ValidateAdapterRequest,
)
from adaplex.v1.generation_pb2 import GenerateRequest, GenerationSpec, SamplingParams
from server.calls import status, until
from server.toy import FakeRunner, adapter_files, rig, upload_messages

MIB = 1 << 20


def ask(adapter: str, **fields: Any) -> GenerateRequest:
    return GenerateRequest(spec=GenerationSpec(text="x", adapter=adapter, **fields))


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

        await toy.generation.Generate(ask("german"))
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
        old = await toy.generation.Generate(ask("a@1"))
        new = await toy.generation.Generate(ask("a"))
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


async def test_pages_follow_each_other_by_name(tmp_path: Path) -> None:
    async with rig(tmp_path) as toy:
        for name in "cab":
            await toy.upload(name, seed=ord(name))
        first = await toy.adapters.ListAdapters(ListAdaptersRequest(page_size=2))
        assert [a.name for a in first.adapters] == ["a", "b"]
        rest = await toy.adapters.ListAdapters(
            ListAdaptersRequest(page_size=2, page_token=first.next_page_token)
        )
        assert [a.name for a in rest.adapters] == ["c"]
        assert rest.next_page_token == ""


@pytest.mark.parametrize(
    ("field", "fields"), [("page_size", {"page_size": 1001}), ("page_token", {"page_token": "/"})]
)
async def test_a_page_out_of_range_is_refused(
    tmp_path: Path, field: str, fields: dict[str, Any]
) -> None:
    async with rig(tmp_path) as toy:
        code, details = await status(toy.adapters.ListAdapters(ListAdaptersRequest(**fields)))
    assert code is grpc.StatusCode.INVALID_ARGUMENT
    assert details["BadRequest"].field_violations[0].field == field


async def test_unload_frees_memory_and_keeps_the_adapter(tmp_path: Path) -> None:
    async with rig(tmp_path) as toy:
        await toy.upload("a")
        await toy.generation.Generate(ask("a"))
        request = UnloadAdapterRequest(name="a")
        assert (await toy.adapters.UnloadAdapter(request)).was_resident
        assert not (await toy.adapters.UnloadAdapter(request)).was_resident
        assert not toy.engine.stats().resident
        assert (await toy.generation.Generate(ask("a"))).text


async def test_a_running_request_outlives_the_deletion_of_its_adapter(tmp_path: Path) -> None:
    runner = FakeRunner(lambda request: [65])
    async with rig(tmp_path, runner=runner) as toy:
        stored = await toy.upload("a")
        runner.gate.clear()
        running = asyncio.ensure_future(
            toy.generation.Generate(ask("a", sampling=SamplingParams(max_tokens=5)))
        )
        await until(lambda: toy.engine.stats().running == 1)
        deleted = await toy.adapters.DeleteAdapter(DeleteAdapterRequest(name="a"))
        assert deleted.versions_deleted == 1
        code, _ = await status(toy.generation.Generate(ask("a")))
        assert code is grpc.StatusCode.NOT_FOUND
        runner.gate.set()
        answer = await running
        assert answer.text == "A" * 5
        assert answer.started.adapter.digest == stored.adapter.digest
        await until(lambda: not toy.engine.stats().resident)


@pytest.mark.parametrize("rpc", ["GetAdapter", "UnloadAdapter", "DeleteAdapter"])
async def test_what_is_not_there_is_not_found(tmp_path: Path, rpc: str) -> None:
    request = getattr(adapters_pb2, f"{rpc}Request")(name="nobody")
    async with rig(tmp_path) as toy:
        code, _ = await status(getattr(toy.adapters, rpc)(request))
    assert code is grpc.StatusCode.NOT_FOUND


def write(folder: Path) -> Path:
    folder.mkdir(parents=True)
    for name, data in adapter_files().items():
        (folder / name).write_bytes(data)
    return folder


async def test_a_directory_under_a_root_is_loaded(tmp_path: Path) -> None:
    path = write(tmp_path / "root" / "my adapter")
    async with rig(tmp_path, adapter_roots=(tmp_path / "root",)) as toy:
        done = await toy.adapters.LoadAdapter(LoadAdapterRequest(name="a", uri=str(path)))
        again = await toy.adapters.LoadAdapter(LoadAdapterRequest(name="a", uri=path.as_uri()))
    assert (done.created, again.created) == (True, False)
    assert done.adapter.name == "a"


async def test_a_path_outside_the_roots_is_refused_however_it_is_written(tmp_path: Path) -> None:
    write(tmp_path / "outside")
    root = tmp_path / "root"
    root.mkdir()
    (root / "link").symlink_to(tmp_path / "outside")
    (root / "loop").symlink_to(root / "loop")
    (root / "file").write_text("x")
    uris = {
        str(tmp_path / "outside"): "--adapter-roots",
        f"{root}/../outside": "--adapter-roots",
        f"file://{root}/%2e%2e/outside": "--adapter-roots",
        str(root / "link"): "--adapter-roots",
        str(tmp_path / "rootless"): "--adapter-roots",
        "outside": "absolute",
        "https://example.org/a": "absolute",
        f"file://elsewhere{root}": "absolute",
        f"{root}/a\0b": "absolute",
        str(root / "absent"): "directory",
        str(root / "file"): "directory",
        "file://[x": "absolute",
        "http://[::1": "absolute",
        "file:///%00": "absolute",
        str(root / "loop"): "--adapter-roots",
        f"{root}/{'a' * 300}": "directory",
    }
    async with rig(tmp_path, adapter_roots=(root,)) as toy:
        for uri, reason in uris.items():
            call = toy.adapters.LoadAdapter(LoadAdapterRequest(name="a", uri=uri))
            code, details = await status(call)
            assert code is grpc.StatusCode.INVALID_ARGUMENT, uri
            violation = details["BadRequest"].field_violations[0]
            assert violation.field == "uri"
            assert reason in violation.description, uri


async def test_without_roots_nothing_is_loaded(tmp_path: Path) -> None:
    path = write(tmp_path / "x")
    async with rig(tmp_path) as toy:
        call = toy.adapters.LoadAdapter(LoadAdapterRequest(name="a", uri=str(path)))
        code, details = await status(call)
    assert code is grpc.StatusCode.INVALID_ARGUMENT
    assert "--adapter-roots" in details["BadRequest"].field_violations[0].description


async def test_questions_about_adapters_do_not_starve_generation(tmp_path: Path) -> None:
    may_go = threading.Event()
    async with rig(tmp_path) as toy:
        await toy.upload("a")
        registry = toy.parts.registry
        report = registry.programs.report

        def slow(digest: str) -> Any:
            may_go.wait(10)
            return report(digest)

        registry.programs.report = slow  # type: ignore[method-assign]
        flood = [
            asyncio.ensure_future(toy.adapters.GetAdapter(GetAdapterRequest(name="a")))
            for _ in range(64)
        ]
        await until(lambda: len(toy.server._edge.inflight) == 64)
        try:
            answer = await asyncio.wait_for(toy.generation.Generate(ask("a")), 5)
        finally:
            may_go.set()
        assert answer.text
        await asyncio.gather(*flood)


async def test_content_that_goes_with_its_last_request_leaves_the_memory(tmp_path: Path) -> None:
    async with rig(tmp_path, runner=FakeRunner(slow=0.01)) as toy:
        stored = await toy.upload("a")
        toy.runner.gate.clear()
        running = asyncio.ensure_future(
            toy.generation.Generate(
                ask("a", sampling=SamplingParams(max_tokens=200, ignore_eos=True))
            )
        )
        await until(lambda: toy.engine.stats().running == 1)
        await toy.adapters.DeleteAdapter(DeleteAdapterRequest(name="a"))
        assert stored.adapter.digest in toy.engine.stats().resident, "it is in use"
        assert toy.parts.registry.garbage.orphans() == {stored.adapter.digest}
        toy.runner.gate.set()
        assert (await running).started.adapter.digest == stored.adapter.digest
        await until(lambda: not toy.engine.stats().resident)
        await until(lambda: not toy.parts.registry.garbage.orphans())


async def test_a_cancelled_request_gives_its_lease_back(tmp_path: Path) -> None:
    resolving, may_go = threading.Event(), threading.Event()
    async with rig(tmp_path) as toy:
        await toy.upload("a")
        registry = toy.parts.registry
        resolve = registry.resolve

        def slow(selector: str, **options: Any) -> Any:
            resolving.set()
            may_go.wait(5)
            return resolve(selector, **options)

        registry.resolve = slow  # type: ignore[method-assign]
        call = toy.generation.Generate(ask("a"))
        await asyncio.to_thread(resolving.wait, 5)
        call.cancel()
        may_go.set()
        await until(lambda: len(toy.server._edge.inflight) == 0)
