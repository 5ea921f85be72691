"""Many threads that use one name and one lease."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from adapters.handmade import (
    UPLOAD,
    files,
    make_registry,
    push,
    stage,
    staged,
    tensors,
)


def test_one_name_uploaded_by_many_gets_a_version_for_each_change(tmp_path: Path) -> None:
    registry = make_registry(tmp_path)
    contents = [files(weights=tensors(seed=seed)) for seed in range(4)]
    stagings = [stage(registry, content) for content in contents for _ in range(2)]
    with ThreadPoolExecutor(len(stagings)) as pool:
        done = list(
            pool.map(
                lambda s: registry.intake.commit(s, "a", replace=True, origin=UPLOAD), stagings
            )
        )
    versions = sorted(committed.record.version for committed in done if committed.created)
    assert versions == list(range(1, len(versions) + 1))
    assert len(versions) >= len(contents)
    assert len(list((tmp_path / "objects").iterdir())) == len(contents)
    assert staged(tmp_path) == []
    registry.check_integrity()
    registry.close()


def test_a_lease_released_by_many_threads_counts_once(tmp_path: Path) -> None:
    registry = make_registry(tmp_path)
    push(registry, "a")
    kept = registry.resolve("a")
    with ThreadPoolExecutor(4) as pool:
        for _ in range(20):
            lease = registry.resolve("a")
            for done in [pool.submit(lease.release) for _ in range(4)]:
                done.result()
    registry.names.delete("a", UPLOAD)
    assert registry.programs.program(kept.record.digest)
    kept.release()
    registry.check_integrity()
    assert list((tmp_path / "objects").iterdir()) == []
    registry.close()
