"""The cache's byte budget: least recently used first, and never what is in use."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from filelock import FileLock

from adaplex.model.base.cache_folder import MADE, CacheEntry, CacheFolder, Use
from adaplex.model.base.loader import load_base
from tiny import save_tiny


def put(cache: Path, name: str, size: int, used: int) -> Path:
    path = cache / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"x" * size)
    os.utime(path, (used, used))
    return path


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    """Four files of 10 bytes, the oldest first, two models and what is not of the cache."""
    for used, name in enumerate(["quantized/a", "kernels/b.so", "quantized/c", "kernels/d.so"], 1):
        put(tmp_path, name, 10, used)
    for used in (6, 5):
        put(tmp_path, f"models/m{used}/model.safetensors", 100, used)
    put(tmp_path, "hashes.json", 1000, 0)
    put(tmp_path, "quantized/.a.lock", 0, 0)
    put(tmp_path, "tools/x", 1000, 0)
    return tmp_path


def names(entries: list[CacheEntry]) -> list[str]:
    return [entry.path.name for entry in entries]


def test_entries_are_sorted_by_their_last_use(cache: Path) -> None:
    entries = CacheFolder(cache).entries()
    assert names(entries) == ["a", "b.so", "c", "d.so", "m5", "m6"]
    assert [entry.size for entry in entries] == [10, 10, 10, 10, 100, 100]
    assert not any(entry.in_use for entry in entries)
    assert CacheFolder(cache / "none").entries() == []


@pytest.mark.parametrize(
    ("limit", "removed"),
    [(40, []), (39, ["a"]), (20, ["a", "b.so"]), (0, ["a", "b.so", "c", "d.so"])],
)
def test_the_least_recently_used_go_first(cache: Path, limit: int, removed: list[str]) -> None:
    folder = CacheFolder(cache)
    assert names(folder.trim(limit)) == removed
    assert sum(entry.size for entry in folder.entries(MADE)) <= limit
    assert (cache / "models/m5/model.safetensors").exists()
    assert (cache / "hashes.json").exists()


def test_a_file_in_use_stays_until_its_use_ends(cache: Path) -> None:
    folder = CacheFolder(cache)
    stamp = (cache / "quantized/a").stat().st_mtime_ns
    use = Use([cache / "quantized/a", cache / "gone"])
    assert use.paths == [cache / "quantized/a"]
    assert (cache / "quantized/a").stat().st_mtime_ns == stamp
    assert names([entry for entry in folder.entries() if entry.in_use]) == ["a"]
    assert names(folder.entries(MADE)) == ["b.so", "c", "d.so", "a"]
    assert names(folder.trim(0)) == ["b.so", "c", "d.so"]
    del use
    assert names(folder.trim(0)) == ["a"]


def test_another_process_uses_a_file(cache: Path) -> None:
    program = (
        "import sys, pathlib; from adaplex.model.base.cache_folder import Use\n"
        f"use = Use([pathlib.Path({str(cache / 'kernels/b.so')!r})]); print(flush=True); input()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as process:
        assert process.stdout is not None
        process.stdout.readline()
        removed, left = CacheFolder(cache).clear()
        assert (names(removed), names(left)) == (["a", "c", "d.so"], ["b.so"])
        process.kill()
    assert names(CacheFolder(cache).clear()[0]) == ["b.so"]


def test_models_are_removed_on_request_only(cache: Path) -> None:
    folder = CacheFolder(cache)
    use = Use([cache / "models/m6/model.safetensors"])
    removed, left = folder.clear(["models"])
    assert (names(removed), names(left)) == (["m5"], ["m6"])
    assert not (cache / "models/m5").exists()
    assert len(folder.entries(MADE)) == 4
    del use


@pytest.mark.parametrize(
    ("left", "lock"),
    [
        ("kernels/tmp1/kernels.so", "kernels/.lock"),
        ("quantized/.a.partial", "quantized/.a.partial.lock"),
        ("models/.m.partial/x", "models/.m.lock"),
    ],
)
def test_what_a_process_is_making_stays(left: str, lock: str, tmp_path: Path) -> None:
    path = put(tmp_path, left, 10, 1)
    folder = CacheFolder(tmp_path)
    kind = folder.entries()[0].kind
    with FileLock(tmp_path / lock):
        assert folder.clear([kind])[0] == []
    assert len(folder.clear([kind])[0]) == 1
    assert not path.exists()


def test_a_start_uses_its_files_and_removes_others(tmp_path: Path) -> None:
    model, cache = save_tiny("llama", tmp_path / "model"), tmp_path / "cache"
    other = put(cache, "quantized/other", 10, 1)
    settings = {
        "quantization": "nf4",
        "native": False,
        "cache": cache,
        "saved": cache / "quantized",
    }
    said: list[str] = []
    base = load_base(str(model), **settings, cache_limit=0, progress=said.append)  # type: ignore[arg-type]
    assert not other.exists()
    assert said[-1] == "removed 1 files, 10 bytes, that the cache had beyond its limit"
    [entry] = CacheFolder(cache).entries()
    assert entry.in_use
    del base
