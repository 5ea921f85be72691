from __future__ import annotations

import asyncio
import hashlib
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import grpc
import pytest
from google.rpc.error_details_pb2 import BadRequest

from adaplex.client import (
    Adapter,
    AdapterDetails,
    AliasTarget,
    AsyncClient,
    InvalidArgument,
    Refusal,
    ResidencyTier,
    UploadResult,
)
from adaplex.client.upload import CHUNK_BYTES
from adaplex.v1 import adapters_pb2
from client.canned import DIGEST
from client.fake_server import FakeServer
from time_limits import WAIT_SECONDS

TONE = Adapter(
    name="tone",
    version=1,
    digest=DIGEST,
    family="lora",
    modules=2,
    max_rank=8,
    stored_bytes=3 << 20,
    packed_bytes=1 << 20,
    create_time=datetime(2023, 11, 14, 22, 13, 20, 500_000, tzinfo=UTC),
    resident=True,
    description="",
    labels={"team": "blue"},
    pinned=False,
    aliases={"default": (AliasTarget(3, 95.0), AliasTarget(4, 5.0))},
    source="upload",
    actor="ada",
    base_fingerprint=DIGEST,
    signer="",
    update_time=datetime(2023, 11, 14, 22, 13, 21, tzinfo=UTC),
    tier=ResidencyTier.ARENA,
    leading_tokens=12,
    invocation_tokens=(7, 8),
    merged_only=True,
)


def test_an_upload_arrives_whole_in_order_and_chunked(
    call: Any, server: FakeServer, adapter_directory: Path
) -> None:
    result = call("adapters.upload", "tone", adapter_directory)
    assert isinstance(result, UploadResult)
    assert (result.adapter, result.created) == (TONE, True)
    [upload] = server.uploads
    names = ["adapter_config.json", "adapter_model.safetensors"]
    assert [file.name for file in upload.metadata.files] == names
    for index, file in enumerate(upload.metadata.files):
        content = (adapter_directory / file.name).read_bytes()
        assert upload.content(index) == content
        assert file.size_bytes == len(content)
        assert file.sha256 == hashlib.sha256(content).hexdigest()
    assert [(c.file_index, c.offset, len(c.data)) for c in upload.chunks] == [
        (0, 0, 21),
        (1, 0, CHUNK_BYTES),
        (1, CHUNK_BYTES, CHUNK_BYTES),
        (1, 2 * CHUNK_BYTES, CHUNK_BYTES // 2),
    ]


@pytest.mark.parametrize(
    ("replace", "policy"),
    [
        (False, adapters_pb2.UPLOAD_POLICY_CREATE),
        (True, adapters_pb2.UPLOAD_POLICY_REPLACE),
    ],
)
def test_replace_is_a_policy(
    call: Any, server: FakeServer, adapter_directory: Path, replace: bool, policy: int
) -> None:
    call("adapters.upload", "tone", adapter_directory, replace=replace)
    call("adapters.load", "tone", "/srv/tone", replace=replace)
    assert server.uploads[0].metadata.policy == policy
    assert server.requests[-1].policy == policy


def test_progress_rises_to_the_total(call: Any, adapter_directory: Path) -> None:
    seen: list[tuple[int, int]] = []
    call(
        "adapters.upload",
        "tone",
        adapter_directory,
        progress=lambda sent, total: seen.append((sent, total)),
    )
    total = 21 + 5 * CHUNK_BYTES // 2
    sent = [sent for sent, _ in seen]
    assert {total for _, total in seen} == {total}
    assert sent == sorted(set(sent))
    assert (sent[0], sent[-1]) == (0, total)


def test_a_progress_callback_that_fails_is_not_swallowed(
    call: Any, adapter_directory: Path
) -> None:
    def fail(sent: int, total: int) -> None:
        raise LookupError("no terminal")

    with pytest.raises(LookupError, match="no terminal"):
        call("adapters.upload", "tone", adapter_directory, progress=fail)


@pytest.mark.parametrize("chunks", [None, 1, 3])
@pytest.mark.parametrize("method", ["upload", "validate"])
def test_a_refusal_during_an_upload_is_raised(
    call: Any, server: FakeServer, adapter_directory: Path, chunks: int | None, method: str
) -> None:
    with (adapter_directory / "adapter_model.safetensors").open("ab") as file:
        file.truncate(16 << 20)
    server.fail_after_chunks = chunks
    why = BadRequest.FieldViolation(field="files[1].sha256", description="does not match")
    server.fail(grpc.StatusCode.INVALID_ARGUMENT, "refused", BadRequest(field_violations=[why]))
    arguments = ["tone", adapter_directory] if method == "upload" else [adapter_directory]
    with pytest.raises(InvalidArgument, match="does not match"):
        call(f"adapters.{method}", *arguments)


async def test_cancelling_an_upload_reaches_the_server(
    server: FakeServer, adapter_directory: Path
) -> None:
    with (adapter_directory / "adapter_model.safetensors").open("ab") as file:
        file.truncate(64 << 20)
    server.hold = True
    started = asyncio.Event()
    loop = asyncio.get_running_loop()

    def progress(sent: int, total: int) -> None:
        if sent:
            loop.call_soon_threadsafe(started.set)

    async with AsyncClient(server.target) as client:
        uploading = asyncio.create_task(
            client.adapters.upload("tone", adapter_directory, progress=progress)
        )
        await asyncio.wait_for(started.wait(), WAIT_SECONDS)
        uploading.cancel()
        with pytest.raises(asyncio.CancelledError):
            await uploading
        assert await asyncio.to_thread(server.cancelled.wait, WAIT_SECONDS)


@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors"])
def test_a_missing_file_is_named(
    call: Any, server: FakeServer, adapter_directory: Path, name: str
) -> None:
    (adapter_directory / name).unlink()
    with pytest.raises(InvalidArgument, match=f"{name}: missing") as raised:
        call("adapters.upload", "tone", adapter_directory)
    assert raised.value.violations[0].field == name
    assert server.uploads == []


def test_a_pickled_adapter_must_be_converted(call: Any, adapter_directory: Path) -> None:
    (adapter_directory / "adapter_model.safetensors").rename(
        adapter_directory / "adapter_model.bin"
    )
    with pytest.raises(InvalidArgument, match=r"adapter_model\.bin .* convert it to safetensors"):
        call("adapters.validate", adapter_directory)


def test_a_missing_directory_is_named(call: Any, tmp_path: Path) -> None:
    with pytest.raises(InvalidArgument, match="is not a directory"):
        call("adapters.upload", "tone", tmp_path / "nothing")


def test_validate_gives_the_report_of_an_upload(
    call: Any, server: FakeServer, adapter_directory: Path
) -> None:
    good = call("adapters.validate", adapter_directory)
    assert good.valid
    assert good.report == call("adapters.upload", "tone", adapter_directory).report
    assert [module.module for module in good.report.modules] == [
        "model.layers.0.self_attn.q_proj",
        "model.layers.1.self_attn.q_proj",
    ]
    assert good.report.modules[0].scale == 2.0
    assert good.report.notes == ("task_type has no effect",)


def test_validate_lists_every_refusal(
    call: Any, server: FakeServer, adapter_directory: Path
) -> None:
    server.refusals = [("r", "must be positive"), ("lm_head.lora_A", "holds NaN")]
    checked = call("adapters.validate", adapter_directory)
    assert not checked.valid
    assert checked.report.refusals == tuple(Refusal(*refusal) for refusal in server.refusals)


@pytest.mark.parametrize("page_size", [1, 2, 5, 100])
def test_list_goes_through_all_pages(call: Any, server: FakeServer, page_size: int) -> None:
    listed = call("adapters.list", page_size=page_size)
    assert [adapter.name for adapter in listed] == server.names
    assert len(server.requests) == -(-len(server.names) // page_size)


def test_get_load_unload_delete(call: Any, server: FakeServer) -> None:
    details = call("adapters.get", "tone")
    assert isinstance(details, AdapterDetails)
    assert details.adapter == TONE
    loaded = call("adapters.load", "tone", "/srv/tone")
    assert (loaded.adapter, loaded.created) == (TONE, False)
    assert server.requests[-1].uri == "/srv/tone"
    assert call("adapters.unload", "adapter-1") is True
    assert call("adapters.unload", "nobody") is False
    assert call("adapters.delete", "tone") == 2


@pytest.mark.parametrize(
    ("method", "arguments", "options", "field"),
    [
        ("get", ["\udcff"], {}, "name"),
        ("delete", [7], {}, "name"),
        ("load", ["tone", Path("/srv")], {}, "uri"),
        ("list", [], {"page_size": -1}, "page_size"),
    ],
)
def test_a_value_its_field_cannot_hold_is_named_and_not_sent(
    call: Any,
    server: FakeServer,
    method: str,
    arguments: list[Any],
    options: dict[str, Any],
    field: str,
) -> None:
    with pytest.raises(InvalidArgument) as raised:
        call(f"adapters.{method}", *arguments, **options)
    assert raised.value.violations[0].field == field
    assert server.requests == []


def test_an_upload_name_that_is_no_text_is_named(
    call: Any, server: FakeServer, adapter_directory: Path
) -> None:
    with pytest.raises(InvalidArgument, match="name: "):
        call("adapters.upload", "\udcff", adapter_directory)
    assert server.uploads == []


@pytest.mark.parametrize(
    ("name", "content", "warned"),
    [
        ("chat_template.jinja", "{{ messages }}", True),
        ("tokenizer_config.json", '{"chat_template": "x"}', True),
        ("tokenizer_config.json", "{}", False),
        ("tokenizer_config.json", "damaged", False),
        ("added_tokens.json", '{"<x>": 320}', True),
        ("README.md", "text", False),
    ],
)
def test_files_that_render_text_are_not_left_out_in_silence(
    call: Any, adapter_directory: Path, name: str, content: str, warned: bool
) -> None:
    (adapter_directory / name).write_text(content)
    for report in (
        call("adapters.upload", "tone", adapter_directory).report,
        call("adapters.validate", adapter_directory).report,
    ):
        assert [warning.partition(":")[0] for warning in report.warnings] == [name] * warned
