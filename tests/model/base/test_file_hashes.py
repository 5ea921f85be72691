from __future__ import annotations

import hashlib
import json
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from adaplex.model import file_hashes
from adaplex.model.file_hashes import FileHashes

OLD = time.time_ns() - 3600 * 10**9


@pytest.fixture
def hashed(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """The files that were hashed. Hashes of any size are cached; files count as old."""
    read: list[Path] = []
    real = file_hashes.file_sha256

    def sha256(path: Path) -> str:
        read.append(path)
        return real(path)

    monkeypatch.setattr(file_hashes, "file_sha256", sha256)
    monkeypatch.setattr(file_hashes, "CACHED_BYTES", 1)
    monkeypatch.setattr(file_hashes, "RACY_NS", -(10**12))
    return read


@pytest.fixture
def hashes(tmp_path: Path) -> FileHashes:
    return FileHashes(tmp_path / "cache" / "hashes.json")


@pytest.fixture
def file(tmp_path: Path) -> Path:
    (tmp_path / "weights").write_bytes(b"first")
    os.utime(tmp_path / "weights", ns=(OLD, OLD))
    return tmp_path / "weights"


def right(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()


def test_a_file_is_read_once(hashed: list[Path], hashes: FileHashes, file: Path) -> None:
    for _ in range(3):
        assert hashes.sha256(file) == right(file)
    assert hashed == [file]
    link = file.with_name("link")
    link.symlink_to(file)
    assert hashes.sha256(link) == right(file)
    assert hashed == [file]


def append(file: Path) -> None:
    with file.open("ab") as stream:
        stream.write(b"more")


def write_over_and_set_the_time_back(file: Path) -> None:
    file.write_bytes(b"other")
    os.utime(file, ns=(OLD, OLD))


def replace_by_one_of_the_same_age(file: Path) -> None:
    write_over_and_set_the_time_back(other := file.with_name("other"))
    other.rename(file)


@pytest.mark.parametrize(
    "change", [append, write_over_and_set_the_time_back, replace_by_one_of_the_same_age]
)
def test_a_changed_file_is_read_again(
    change: Callable[[Path], None], hashed: list[Path], hashes: FileHashes, file: Path
) -> None:
    before = hashes.sha256(file)
    change(file)
    assert hashes.sha256(file) == right(file) != before
    assert len(hashed) == 2


def test_the_hash_of_a_file_just_written_is_not_cached(
    hashed: list[Path], hashes: FileHashes, file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(file_hashes, "RACY_NS", 2 * 10**9)
    for _ in range(2):
        assert hashes.sha256(file) == right(file)  # its ctime is of now
    assert len(hashed) == 2
    monkeypatch.setattr(file_hashes, "RACY_NS", -(10**12))
    os.utime(file, ns=(time.time_ns() + 10**13,) * 2)  # from the future
    hashes.sha256(file)
    hashes.sha256(file)
    assert len(hashed) == 4


def test_the_hash_of_a_file_that_changes_meanwhile_is_not_cached(
    hashed: list[Path], hashes: FileHashes, file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    counting = file_hashes.file_sha256

    def slowly(path: Path) -> str:
        digest = counting(path)
        append(path)
        return digest

    monkeypatch.setattr(file_hashes, "file_sha256", slowly)
    hashes.sha256(file)
    monkeypatch.setattr(file_hashes, "file_sha256", counting)
    assert hashes.sha256(file) == right(file)
    assert len(hashed) == 2


def flip_a_digit(text: str) -> str:
    kept = json.loads(text)
    (known,) = kept["files"].values()
    known["sha256"] = "0" * 64
    return json.dumps(kept)


@pytest.mark.parametrize(
    "damage",
    [lambda _: "", lambda text: text[:-9], lambda _: "[]", lambda _: "{}", flip_a_digit],
    ids=["empty", "cut", "a list", "nothing", "a wrong hash"],
)
def test_a_damaged_file_of_hashes_is_ignored(
    damage: Callable[[str], str], hashed: list[Path], hashes: FileHashes, file: Path, tmp_path: Path
) -> None:
    hashes.sha256(file)
    memory = tmp_path / "cache" / "hashes.json"
    memory.write_text(damage(memory.read_text()))
    assert hashes.sha256(file) == right(file)
    assert hashes.sha256(file) == right(file)
    assert len(hashed) == 2


def test_a_file_is_hashed_again_where_the_cache_cannot_be_written(
    hashed: list[Path], hashes: FileHashes, file: Path, tmp_path: Path
) -> None:
    (tmp_path / "cache").write_text("a file")
    assert hashes.sha256(file) == right(file)
    assert hashes.sha256(file) == right(file)
    assert len(hashed) == 2


def test_files_that_no_longer_exist_are_dropped(
    hashed: list[Path], hashes: FileHashes, file: Path, tmp_path: Path
) -> None:
    other = tmp_path / "other"
    other.write_bytes(b"x")
    hashes.sha256(file)
    hashes.sha256(other)
    file.unlink()
    third = tmp_path / "third"
    third.write_bytes(b"y")
    hashes.sha256(third)
    kept = json.loads((tmp_path / "cache" / "hashes.json").read_text())["files"]
    assert set(kept) == {str(other), str(third)}
    assert (tmp_path / "cache" / "hashes.json").stat().st_mode & 0o777 == 0o644


def test_several_writers_leave_an_intact_file(
    hashed: list[Path], hashes: FileHashes, tmp_path: Path
) -> None:
    files = [tmp_path / f"{i}" for i in range(8)]
    for each in files:
        each.write_bytes(each.name.encode())
    threads = [threading.Thread(target=hashes.sha256, args=(each,)) for each in files * 3]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [hashes.sha256(each) for each in files] == [right(each) for each in files]
    assert [path.name for path in (tmp_path / "cache").iterdir()] == ["hashes.json"]


def test_hashes_of_small_files_are_not_cached(
    file: Path, hashes: FileHashes, tmp_path: Path
) -> None:
    assert hashes.sha256(file) == right(file)
    assert not (tmp_path / "cache").exists()
