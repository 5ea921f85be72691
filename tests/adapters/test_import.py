from __future__ import annotations

from pathlib import Path

import pytest

from adaplex.adapters.checkpoint import CONFIG, WEIGHTS
from adaplex.adapters.errors import (
    AdapterExists,
    AdapterInvalid,
    AdapterTooLarge,
)
from adaplex.adapters.registry import AdapterLimits, AdapterRegistry
from adapters.handmade import (
    files,
    make_registry,
    push,
    tensors,
    write,
)


def test_import_copies_a_directory(registry: AdapterRegistry, tmp_path: Path) -> None:
    source = write(tmp_path / "source", files() | {"README.md": b"not an adapter file"})
    done = registry.import_directory(source, "tone", replace=False)
    assert done.created
    assert done.record.digest == push(registry, "pushed").record.digest
    assert not registry.import_directory(source, "tone", replace=False).created
    write(source, files(weights=tensors(seed=1)))
    with pytest.raises(AdapterExists):
        registry.import_directory(source, "tone", replace=False)
    assert registry.import_directory(source, "tone", replace=True).record.version == 2


@pytest.mark.parametrize("name", [CONFIG, WEIGHTS])
def test_import_does_not_follow_links_out_of_the_roots(
    registry: AdapterRegistry, tmp_path: Path, name: str
) -> None:
    blobs = write(tmp_path / "blobs", files())
    snapshot = write(tmp_path / "snapshot", files())
    (snapshot / name).unlink()
    (snapshot / name).symlink_to(Path("..", "blobs", name))
    for roots in ([], [snapshot], [tmp_path / "snap"]):
        with pytest.raises(AdapterInvalid, match="leads out of the allowed folders"):
            registry.import_directory(snapshot, "tone", replace=False, roots=roots)
    assert registry.import_directory(
        snapshot, "tone", replace=False, roots=[snapshot, blobs]
    ).created
    (snapshot / name).unlink()
    (snapshot / name).symlink_to(name)
    with pytest.raises(AdapterInvalid):
        registry.import_directory(snapshot, "loop", replace=False)


def test_import_names_what_is_missing_or_too_large(tmp_path: Path) -> None:
    limits = AdapterLimits(max_adapter_bytes=1000)
    registry = make_registry(tmp_path / "store", limits=limits)
    with pytest.raises(AdapterInvalid, match="missing"):
        registry.import_directory(tmp_path / "nowhere", "tone", replace=False)
    large = write(tmp_path / "large", files())
    with pytest.raises(AdapterTooLarge, match="the limit is 1000"):
        registry.import_directory(large, "tone", replace=False)
    (tmp_path / "folder" / CONFIG).mkdir(parents=True)
    with pytest.raises(AdapterInvalid):
        registry.import_directory(tmp_path / "folder", "tone", replace=False)
    registry.close()
