"""Local folders, the hub and buckets, with and without the importer."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from adaplex.adapters.checkpoint import CONFIG, WEIGHTS
from adaplex.adapters.errors import (
    AdapterError,
    AdapterExists,
    AdapterInvalid,
    AdapterNotFound,
    AdapterTooLarge,
    SourceUnavailable,
)
from adaplex.adapters.limits import AdapterLimits
from adaplex.adapters.registry.registry import AdapterRegistry
from adaplex.adapters.sources.sources import Sources
from adaplex.adapters.storage.bucket import Bucket
from adapters.handmade import UPLOAD, files, make_importer, make_sources, push, tensors, write
from adapters.hub_server import Hub, serving


def load(registry: AdapterRegistry, uri: str, roots: list[Path], **options: Any) -> Any:
    importer = make_importer(registry, roots, **options)
    return importer.load(uri, "tone", replace=True, origin=UPLOAD)


# Directories.


def test_a_directory_is_copied_in(registry: AdapterRegistry, tmp_path: Path) -> None:
    folder = write(tmp_path / "a", files() | {"README.md": b"not an adapter file"})
    done = load(registry, str(folder), [tmp_path])
    assert done.record.digest == push(registry, "pushed").record.digest
    assert done.record.source == str(folder)
    assert not load(registry, f"file://{folder}", [tmp_path]).created
    write(folder, files(weights=tensors(seed=1)))
    importer = make_importer(registry, [tmp_path])
    with pytest.raises(AdapterExists):
        importer.load(str(folder), "tone", replace=False, origin=UPLOAD)
    assert load(registry, str(folder), [tmp_path]).record.version == 2


@pytest.mark.parametrize("name", [CONFIG, WEIGHTS])
def test_links_out_of_the_roots_are_not_followed(
    registry: AdapterRegistry, tmp_path: Path, name: str
) -> None:
    blobs = write(tmp_path / "blobs", files())
    snapshot = write(tmp_path / "snapshot", files())
    (snapshot / name).unlink()
    (snapshot / name).symlink_to(Path("..", "blobs", name))
    with pytest.raises(AdapterInvalid, match="leads out of --adapter-roots"):
        load(registry, str(snapshot), [snapshot])
    assert load(registry, str(snapshot), [snapshot, blobs]).created
    (snapshot / name).unlink()
    (snapshot / name).symlink_to(name)
    with pytest.raises(AdapterInvalid):
        load(registry, str(snapshot), [snapshot])


@pytest.mark.parametrize(
    "uri",
    [
        "relative",
        "/etc",
        "{root}/../outside",
        "{root}/a\0b",
        "http://host/a",
        "s3://bucket/a",
        "hf://org/repo",
        "{root}/missing",
        "/" + "x" * 3000,
        "file://elsewhere{root}/a",
    ],
)
def test_what_is_not_allowed_is_refused_at_uri(tmp_path: Path, uri: str) -> None:
    root = tmp_path / "root"
    write(root / "a", files())
    write(tmp_path / "outside", files())
    (tmp_path / "into").mkdir()
    with pytest.raises(AdapterError) as caught:
        make_sources(root).fetch(uri.replace("{root}", str(root)), tmp_path / "into")
    assert caught.value.field == "uri"
    assert list((tmp_path / "into").iterdir()) == []


def test_a_refusal_lists_the_allowed_places(tmp_path: Path) -> None:
    (tmp_path / "root").mkdir()
    with pytest.raises(AdapterInvalid, match=f"one of --adapter-roots: {tmp_path / 'root'}$"):
        make_sources(tmp_path / "root").fetch("/etc", tmp_path)
    with pytest.raises(AdapterInvalid, match=r"org/repo must match one of --hub-allow: none$"):
        make_sources().fetch("hf://org/repo", tmp_path)
    with pytest.raises(AdapterInvalid, match=r"must lie under one of --bucket-allow: none$"):
        make_sources().fetch("s3://bucket/a", tmp_path)


def test_without_roots_nothing_is_read(tmp_path: Path) -> None:
    with pytest.raises(AdapterInvalid, match="--adapter-roots"):
        make_sources().fetch(str(tmp_path), tmp_path)


def test_a_directory_that_is_too_large(tmp_path: Path) -> None:
    folder = write(tmp_path / "a", files())
    (tmp_path / "into").mkdir()
    with pytest.raises(AdapterTooLarge, match="the files exceed the limit of 1000 bytes"):
        make_sources(tmp_path, limits=AdapterLimits(max_adapter_bytes=1000)).fetch(
            str(folder), tmp_path / "into"
        )


# The hub.


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    with serving(Hub()) as running:
        monkeypatch.setenv("HF_ENDPOINT", running.url)
        monkeypatch.setattr("adaplex.adapters.sources.hub.TIMEOUT_SECONDS", 5.0)
        yield running


@pytest.fixture
def from_hub(registry: AdapterRegistry, hub: Hub) -> Callable[[str], Any]:
    return lambda uri: load(registry, uri, [], hub_allow=("org/*",))


def test_a_branch_is_pinned_to_its_commit(
    registry: AdapterRegistry, hub: Hub, from_hub: Callable[[str], Any]
) -> None:
    first = hub.commit("main", files())
    done = from_hub("hf://org/tone")
    assert done.record.source == f"hf://org/tone@{first}"
    second = hub.commit("main", files(weights=tensors(seed=1)))
    assert from_hub("hf://org/tone").record.source == f"hf://org/tone@{second}"
    again = from_hub(f"hf://org/tone@{first}")
    assert again.record.digest == done.record.digest
    assert not any("resolve/main" in path for path in hub.requests)


def test_a_folder_a_revision_and_a_redirect(hub: Hub, from_hub: Callable[[str], Any]) -> None:
    hub.redirect = True
    content = {f"adapters/one/{name}": data for name, data in files().items()}
    sha = hub.commit("v1", content | {"README.md": b"x"})
    done = from_hub("hf://org/tone/adapters/one@v1")
    assert done.record.source == f"hf://org/tone/adapters/one@{sha}"


@pytest.mark.parametrize("name", [CONFIG, WEIGHTS])
def test_what_arrives_must_be_what_was_listed(
    hub: Hub, from_hub: Callable[[str], Any], name: str
) -> None:
    hub.commit("main", files())
    right = files()[name]
    for wrong in (right[:-1] + bytes([right[-1] ^ 1]), right[:-1], right + b"x"):
        hub.serve_instead = {name: wrong}
        with pytest.raises(SourceUnavailable, match="differs from the size or hash"):
            from_hub("hf://org/tone")


def test_what_the_hub_does_not_have(hub: Hub, from_hub: Callable[[str], Any]) -> None:
    hub.commit("main", files() | {"other/README.md": b"x"})
    for uri in ("hf://org/nothing", "hf://org/tone@v9", "hf://org/tone/nowhere"):
        with pytest.raises(AdapterNotFound) as caught:
            from_hub(uri)
        assert caught.value.field == "uri"
    hub.commit("main", {CONFIG: files()[CONFIG], "adapter_model.bin": b"pickle"})
    with pytest.raises(AdapterInvalid, match="pickle"):
        from_hub("hf://org/tone")


def test_a_hub_in_trouble(hub: Hub, from_hub: Callable[[str], Any]) -> None:
    hub.commit("main", files())
    hub.status = 500
    with pytest.raises(SourceUnavailable):
        from_hub("hf://org/tone")


def test_a_hub_that_is_away(registry: AdapterRegistry, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(SourceUnavailable):
        load(registry, "hf://org/tone", [], hub_allow=("*/*",))


def test_too_large_is_known_before_anything_is_fetched(registry: AdapterRegistry, hub: Hub) -> None:
    hub.commit("main", files())
    limited = Sources(roots=(), limits=AdapterLimits(max_adapter_bytes=100), hub_allow=("*/*",))
    with pytest.raises(AdapterTooLarge):
        limited.fetch("hf://org/tone", Path("/nonexistent"))
    assert not any("resolve" in path for path in hub.requests)


@pytest.mark.parametrize(
    "uri",
    ["hf://org", "hf://org/../x", "hf://org/tone/../x", "hf://other/tone", "hf://org/tone@a b"],
)
def test_hub_uris_that_are_refused(hub: Hub, from_hub: Callable[[str], Any], uri: str) -> None:
    with pytest.raises(AdapterInvalid) as caught:
        from_hub(uri)
    assert caught.value.field == "uri"
    assert hub.requests == []


# Buckets.


def fill(uri: str, contents: dict[str, bytes]) -> None:
    bucket = Bucket(uri)
    for name, data in contents.items():
        bucket.put(name, data)


def test_a_prefix_of_a_bucket(registry: AdapterRegistry, s3_prefix: str) -> None:
    fill(f"{s3_prefix}/tone", files() | {"checkpoint-1/optimizer.pt": b"x"})
    done = load(registry, f"{s3_prefix}/tone/", [], bucket_allow=(s3_prefix,))
    assert done.record.source == f"{s3_prefix}/tone"
    with pytest.raises(AdapterNotFound):
        load(registry, f"{s3_prefix}/nothing", [], bucket_allow=(s3_prefix,))


def test_a_bucket_outside_what_is_allowed(
    registry: AdapterRegistry,
    s3_prefix: str,
) -> None:
    fill(f"{s3_prefix}/tone", files())
    for uri in (f"{s3_prefix}-other/tone", "s3://elsewhere/tone"):
        with pytest.raises(AdapterInvalid, match=f"--bucket-allow: {s3_prefix}$"):
            load(registry, uri, [], bucket_allow=(s3_prefix,))
    with pytest.raises(AdapterInvalid, match="must be s3://"):
        load(registry, f"{s3_prefix}/../x", [], bucket_allow=(s3_prefix,))


# By name, on first use.


def test_templates_are_tried_in_order_and_misses_remembered(
    registry: AdapterRegistry, hub: Hub, tmp_path: Path
) -> None:
    hub.commit("main", files(weights=tensors(seed=1)))
    write(tmp_path / "tree" / "local", files())
    importer = make_importer(
        registry, [], resolve_templates=(f"{tmp_path}/tree/{{name}}", "hf://org/{name}")
    )
    assert importer.fetch_missing("local@latest")
    assert importer.fetch_missing("tone")
    assert registry.names.get("tone").source.startswith("hf://org/tone@")
    assert registry.names.get("local").source == str(tmp_path / "tree" / "local")
    assert not importer.fetch_missing("nobody")
    asked = len(hub.requests)
    assert not importer.fetch_missing("nobody")
    assert len(hub.requests) == asked
    for selector in ("nobody@3", "sha256:" + "0" * 64, "tone@prod", "a/b"):
        assert not importer.fetch_missing(selector)


def test_many_who_ask_at_once_fetch_once(registry: AdapterRegistry, tmp_path: Path) -> None:
    write(tmp_path / "tree" / "a", files())
    importer = make_importer(registry, [], resolve_templates=(f"{tmp_path}/tree/{{name}}",))
    find, finds = importer._sources.find, []
    start = threading.Barrier(6)

    def counted(name: str, into: Path) -> Any:
        finds.append(name)
        return find(name, into)

    importer._sources.find = counted  # type: ignore[method-assign]

    def ask(_: int) -> bool:
        start.wait()
        return importer.fetch_missing("a")

    with ThreadPoolExecutor(6) as pool:
        assert all(pool.map(ask, range(6)))
    assert finds == ["a"]


def test_a_template_must_have_a_place_for_the_name() -> None:
    for template in ("/srv/adapters", "ftp://host/{name}"):
        with pytest.raises(AdapterInvalid, match="resolve_from"):
            make_sources(resolve_templates=(template,))


def test_what_was_deleted_does_not_come_back_by_itself(
    registry: AdapterRegistry, tmp_path: Path
) -> None:
    write(tmp_path / "tree" / "a", files())
    importer = make_importer(registry, [], resolve_templates=(f"{tmp_path}/tree/{{name}}",))
    assert importer.fetch_missing("a")
    registry.names.delete("a", UPLOAD)
    assert not importer.fetch_missing("a")
    assert not registry.names.exists("a")
