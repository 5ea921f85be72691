"""ProgramCache: reports of stored content are made once, and dropped with the content."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from adaplex.adapters.checkpoint import CONFIG
from adaplex.adapters.errors import AdapterNotFound, StoreCorrupt
from adaplex.adapters.program.report import Report, ReportCache
from adaplex.adapters.registry.program_cache import ProgramCache
from adaplex.adapters.registry.registry import AdapterRegistry
from adapters.handmade import (
    UPLOAD,
    config,
    files,
    make_registry,
    object_folder,
    push,
)


def forbid_reading(monkeypatch: pytest.MonkeyPatch) -> None:
    def read(programs: ProgramCache, digest: str) -> None:
        raise AssertionError(f"{digest} was read again")

    monkeypatch.setattr(ProgramCache, "program", read)


def test_a_report_is_made_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    registry = make_registry(tmp_path)
    done = push(registry, "tone")
    digest = done.record.digest
    with monkeypatch.context() as patch:
        forbid_reading(patch)
        assert registry.programs.report(digest) == done.report
    registry.close()
    registry = make_registry(tmp_path)
    assert registry.programs.report(digest) == done.report
    forbid_reading(monkeypatch)
    assert registry.programs.report(digest) == done.report
    registry.close()


def test_a_report_tells_of_the_files_that_are_stored(registry: AdapterRegistry) -> None:
    first = push(registry, "tone")
    other = push(registry, "tone", files(config(base_model_name_or_path="elsewhere")))
    assert other.report.warnings != first.report.warnings
    assert registry.programs.report(first.record.digest) == first.report


def test_a_report_goes_with_its_content(registry: AdapterRegistry) -> None:
    digest = push(registry, "tone").record.digest
    with registry.resolve("tone"):
        registry.names.delete("tone", UPLOAD)
        assert registry.programs.report(digest).digest == digest
    with pytest.raises(AdapterNotFound):
        registry.programs.report(digest)
    assert not len(registry.programs._reports)


def test_a_report_goes_when_its_content_is_found_damaged(
    registry: AdapterRegistry, tmp_path: Path
) -> None:
    done = push(registry, "tone")
    digest = done.record.digest
    (object_folder(tmp_path / "store", digest) / CONFIG).write_text("{}")
    assert registry.programs.report(digest) == done.report
    with pytest.raises(StoreCorrupt):
        registry.programs.program(digest)
    with pytest.raises(StoreCorrupt):
        registry.programs.report(digest)
    push(registry, "tone")
    assert registry.programs.report(digest) == done.report


def test_a_kept_report_does_not_hide_lost_content(
    registry: AdapterRegistry, tmp_path: Path
) -> None:
    digest = push(registry, "tone").record.digest
    shutil.rmtree(object_folder(tmp_path / "store", digest))
    with pytest.raises(StoreCorrupt):
        registry.programs.report(digest)
    push(registry, "tone")


def test_the_reports_used_last_are_kept() -> None:
    cache = ReportCache(2)
    a, b, c = (Report(digest=digest) for digest in "abc")
    cache.put(a)
    cache.put(b)
    assert cache.get("a") is a
    cache.put(c)
    assert len(cache) == 2
    assert cache.get("b") is None
    assert (cache.get("a"), cache.get("c")) == (a, c)
    cache.drop("a")
    cache.drop("b")
    assert cache.get("a") is None
    assert len(cache) == 1
