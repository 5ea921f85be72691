from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from adaplex.adapters.checkpoint import CONFIG, WEIGHTS
from adaplex.adapters.errors import (
    AdapterExists,
    AdapterInvalid,
    AdapterNotFound,
    AdapterTooLarge,
    StoreFull,
)
from adaplex.adapters.limits import AdapterLimits
from adaplex.adapters.registry.intake import Intake
from adaplex.adapters.registry.registry import AdapterRegistry
from adaplex.adapters.storage.selector import NAME
from adapters.handmade import (
    BASE,
    UPLOAD,
    config,
    files,
    make_base,
    make_registry,
    objects,
    push,
    records,
    specs,
    stage,
    staged,
    tensors,
)


def test_an_upload_is_checked_committed_and_found(registry: AdapterRegistry) -> None:
    contents = files()
    with stage(registry, contents) as staging:
        checked = registry.intake.check(staging)
        assert checked.valid
        assert registry.names.usage().names == 0
        done = registry.intake.commit(staging, "tone", replace=False, origin=UPLOAD)
    record = done.record
    assert done.created
    assert done.report == checked == registry.programs.report(record.digest)
    assert (record.name, record.version, record.family) == ("tone", 1, "lora")
    assert (record.traits.modules, record.traits.max_rank) == (4, 2)
    assert record.stored_bytes == sum(map(len, contents.values()))
    assert record.packed_bytes == checked.packed_bytes
    for selector in ("tone", "tone@1", record.digest):
        assert registry.names.get(selector) == record
    program = registry.programs.program(record.digest)
    assert program.digest == record.digest
    assert program.packed_bytes(4) == record.packed_bytes
    assert {m.module for m in program.modules} == {m.module for m in checked.modules}


def test_versions_count_up_and_never_come_back(registry: AdapterRegistry) -> None:
    made = [push(registry, "tone", seed=seed, replace=True).record for seed in range(3)]
    assert [record.version for record in made] == [1, 2, 3]
    assert registry.names.get("tone") == made[2]
    assert registry.names.get("tone@2") == made[1]
    deleted = registry.names.delete("tone", UPLOAD)
    assert deleted.versions == 3
    assert set(deleted.digests) == {record.digest for record in made}
    for selector in ("tone", "tone@1", made[0].digest):
        with pytest.raises(AdapterNotFound):
            registry.names.get(selector)
    assert push(registry, "tone").record.version == 4
    with pytest.raises(AdapterNotFound):
        registry.names.get("tone@1")


def test_the_same_content_is_not_made_twice(registry: AdapterRegistry, tmp_path: Path) -> None:
    first = push(registry, "tone")
    cosmetic = files(config(task_type=None, base_model_name_or_path="elsewhere"))
    for contents in (files(), cosmetic):
        again = push(registry, "tone", contents)
        assert not again.created
        assert again.record == first.record
    other = push(registry, "other-name")
    assert other.created
    assert other.record.digest == first.record.digest
    assert objects(tmp_path / "store") == {first.record.digest}
    assert registry.names.delete("tone", UPLOAD).digests == ()
    assert registry.programs.program(first.record.digest).digest == first.record.digest


def test_a_taken_name_needs_replace(registry: AdapterRegistry) -> None:
    first = push(registry, "tone").record
    with pytest.raises(AdapterExists, match=first.digest) as caught:
        push(registry, "tone", seed=1)
    assert caught.value.field == "name"
    assert registry.names.get("tone") == first
    assert push(registry, "tone", seed=1, replace=True).record.version == 2


def test_names_are_listed_by_their_newest_version(registry: AdapterRegistry) -> None:
    names = sorted(f"tone-{i}" for i in range(7))
    for i, name in enumerate(reversed(names)):
        push(registry, name, seed=i)
    push(registry, names[2], seed=50, replace=True)
    assert registry.names.usage().names == 7
    assert [record.name for record in records(registry)] == names
    assert records(registry)[2].version == 2


BAD_NAMES = ["", ".", "..", "../x", "a/b", "/etc", "a" * 129, ".hidden", "x\0y", "x\n", "-x", "a b"]


@pytest.mark.parametrize("name", BAD_NAMES)
def test_bad_names_are_refused(registry: AdapterRegistry, name: str) -> None:
    with pytest.raises(AdapterInvalid) as caught:
        push(registry, name)
    assert caught.value.field == "name"
    with pytest.raises(AdapterNotFound):
        registry.names.delete(name, UPLOAD)
    for selector in (name, f"{name}@1", "x@0", "x@01", "x@-1", f"x@{10**30}", "sha256:../x"):
        with pytest.raises(AdapterNotFound):
            registry.resolve(selector)


@given(st.text(max_size=140))
@example("é")
@example("a\u0130")
def test_a_name_is_a_file_name_or_refused(name: str) -> None:
    intake = object.__new__(Intake)
    intake._base = BASE
    if NAME.fullmatch(name):
        intake.check_name(name)
        assert name.isascii()
        assert Path("/root", name).resolve() == Path("/root") / name
    else:
        with pytest.raises(AdapterInvalid, match=r"^[\s\S]{1,400}$"):
            intake.check_name(name)


def test_the_bases_name_is_taken(tmp_path: Path) -> None:
    registry = make_registry(tmp_path, make_base("tiny"))
    with pytest.raises(AdapterExists, match="base model"):
        push(registry, "tiny")
    registry.close()


def test_a_lease_keeps_content_until_its_last_release(
    registry: AdapterRegistry, tmp_path: Path
) -> None:
    digest = push(registry, "tone").record.digest
    leases = [registry.resolve(selector) for selector in ("tone", "tone@1", digest)]
    assert registry.names.delete("tone", UPLOAD).digests == (), "a lease holds it"
    for lease in leases:
        assert registry.programs.program(digest).digest == digest
        registry.check_integrity()
        assert lease.release() == ((digest,) if lease is leases[-1] else ())
        assert lease.release() == ()
    assert registry.leased == 0
    with pytest.raises(AdapterNotFound):
        registry.programs.program(digest)
    assert objects(tmp_path / "store") == set()


def test_a_lease_collects_nothing_that_a_name_holds(registry: AdapterRegistry) -> None:
    digest = push(registry, "tone").record.digest
    assert not registry.resolve("tone").release()
    lease = registry.resolve("tone")
    registry.names.delete("tone", UPLOAD)
    push(registry, "other")
    assert not lease.release()
    assert registry.programs.program(digest).digest == digest


def test_a_lease_outlives_a_replacement_and_a_new_upload(registry: AdapterRegistry) -> None:
    old = push(registry, "tone").record
    with registry.resolve("tone") as lease:
        push(registry, "tone", seed=1, replace=True)
        assert lease.record == old
        registry.names.delete("tone", UPLOAD)
        push(registry, "tone", seed=0)
    assert registry.programs.program(old.digest).digest == old.digest


@pytest.mark.parametrize(
    ("limits", "field"),
    [
        (AdapterLimits(max_adapters=1), "max_adapters"),
        (AdapterLimits(max_store_bytes=2000), "max_store_bytes"),
    ],
)
def test_quotas_hold_for_new_content_only(
    tmp_path: Path, limits: AdapterLimits, field: str
) -> None:
    registry = make_registry(tmp_path, limits=limits)
    first = push(registry, "tone").record
    with pytest.raises(StoreFull) as caught:
        push(registry, "other", seed=1)
    assert caught.value.field == field
    assert not push(registry, "tone").created
    assert objects(tmp_path) == {first.digest}
    assert staged(tmp_path) == []
    registry.names.delete("tone", UPLOAD)
    assert push(registry, "other", seed=1).created
    registry.close()


def test_an_adapter_must_fit_the_arena(tmp_path: Path) -> None:
    registry = make_registry(tmp_path, max_packed_bytes=100)
    with stage(registry, files()) as staging:
        (refusal,) = registry.intake.check(staging).refusals
        assert "the arena has 100" in refusal.reason
        with pytest.raises(AdapterTooLarge, match="the arena has 100"):
            registry.intake.commit(staging, "tone", replace=False, origin=UPLOAD)
    registry.close()


@pytest.mark.parametrize(
    "smaller",
    [
        {"max_packed_bytes": 100},
        {"limits": AdapterLimits(max_rank=1)},
        {"limits": AdapterLimits(max_adapter_bytes=100)},
    ],
)
def test_what_is_stored_can_be_read_under_smaller_limits(
    tmp_path: Path, smaller: dict[str, Any]
) -> None:
    registry = make_registry(tmp_path)
    done = push(registry, "tone")
    digest = done.record.digest
    registry.close()
    registry = make_registry(tmp_path, **smaller)
    assert registry.programs.report(digest) == done.report
    assert registry.programs.program(digest).digest == digest
    with pytest.raises(AdapterTooLarge):
        push(registry, "other", seed=1)
    registry.close()


def test_threads_agree(registry: AdapterRegistry) -> None:
    """Runs uploads, reads and deletions of few names in many threads."""
    contents = [files(weights=tensors(seed=seed)) for seed in range(3)]
    start = threading.Barrier(6)

    def work(worker: int) -> int:
        start.wait()
        read = 0
        for turn in range(30):
            name = f"name-{(worker + turn) % 2}"
            with suppress(AdapterNotFound):
                if (worker + turn) % 3 == 0:
                    push(registry, name, contents[turn % 3], replace=True)
                elif (worker + turn) % 7 == 0:
                    registry.names.delete(name, UPLOAD)
                else:
                    with registry.resolve(name) as lease:
                        program = registry.programs.program(lease.record.digest)
                        assert program.digest == lease.record.digest
                        assert torch.isfinite(program.modules[0].low_rank.a).all()  # type: ignore[union-attr]
                        read += 1
            registry.check_integrity()
        return read

    with ThreadPoolExecutor(6) as pool:
        assert sum(pool.map(work, range(6))) > 0
    for record in records(registry):
        registry.names.delete(record.name, UPLOAD)


def test_one_staging_cannot_be_read_before_it_is_whole(registry: AdapterRegistry) -> None:
    contents = files()
    with registry.intake.stage(specs(contents)) as staging:
        staging.write(0, 0, contents[CONFIG])
        assert registry.intake.check(staging).refusals[0].where == WEIGHTS
        with pytest.raises(AdapterInvalid, match="has 0 of the"):
            registry.intake.commit(staging, "tone", replace=False, origin=UPLOAD)
