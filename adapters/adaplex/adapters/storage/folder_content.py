"""FolderContent: adapters on disk, by content. An object is there whole or not at all.

objects/<digest hex>/   adapter_config.json, adapter_model.safetensors, manifest.json; model.sig
staging/<process>/<id>/ uploads on their way in; swept once their process is gone
lock                    held for a moment by a process that opens the store

Several processes may have it open. Who uses an object holds a shared lock on its manifest, which
ends with the process; who removes one needs it alone.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import shutil
import uuid
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from adaplex.adapters.checkpoint import FILES
from adaplex.adapters.digest import PATTERN, PREFIX
from adaplex.adapters.durable_files import file_sha256, publish, sync
from adaplex.adapters.errors import AdapterNotFound, StoreCorrupt
from adaplex.adapters.storage.content_store import ContentLock
from adaplex.adapters.storage.staging import FileSpec, Staging

MANIFEST = "manifest.json"
ALIVE = "alive"
"""In a process's staging folder: locked as long as the process lives."""


class FolderContent:
    """Contents in a folder of this machine. Which of them are wanted is the catalog's knowledge."""

    def __init__(self, root: Path) -> None:
        """Opens or makes the store; sweeps what processes that are gone left behind."""
        self._objects = root / "objects"
        self._uploads = root / "staging"
        for folder in (self._objects, self._uploads):
            folder.mkdir(parents=True, exist_ok=True)
        sync(root)
        with (root / "lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            self._sweep()
            self._staging = self._uploads / uuid.uuid4().hex
            self._staging.mkdir()
            self._alive = (self._staging / ALIVE).open("w")
            fcntl.flock(self._alive, fcntl.LOCK_SH)

    def stage(self, files: Sequence[FileSpec]) -> Staging:
        """See Contents."""
        return Staging(self._staging / uuid.uuid4().hex, files)

    def scratch_folder(self) -> Path:
        """See Contents."""
        folder = self._staging / uuid.uuid4().hex
        folder.mkdir()
        return folder

    def add(self, staging: Staging, digest: str) -> bool:
        """See Contents."""
        target = self.path(digest)
        if target.exists():
            staging.discard()
            return False
        manifest = {file.name: {"size": file.size, "sha256": file.sha256} for file in staging.files}
        path = staging.directory / MANIFEST
        path.write_text(json.dumps({"digest": digest, "files": manifest}, indent=1))
        sync(path)
        try:
            publish(staging.directory, target)
        except OSError as error:  # another thread was faster with the same content
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                raise
            staging.discard()
            return False
        return True

    def open(self, digest: str) -> Path:
        """See Contents."""
        directory = self.path(digest)
        if not directory.is_dir():
            raise AdapterNotFound(f"{digest} is not in the store")
        try:
            files = json.loads((directory / MANIFEST).read_text())["files"]
            for name in dict.fromkeys([*FILES, *files]):
                found = file_sha256(directory / name)
                if found != files[name]["sha256"]:
                    raise StoreCorrupt(f"{digest}: {name} has SHA-256 {found}, not as stored")
        except (OSError, ValueError, KeyError, TypeError) as error:
            if not directory.is_dir():
                raise AdapterNotFound(f"{digest} was removed meanwhile") from error
            raise StoreCorrupt(f"{digest}: {error}") from error
        return directory

    def lock(self, digest: str) -> ContentLock | None:
        """See Contents."""
        path = self.path(digest) / MANIFEST
        try:
            manifest = path.open()
        except OSError:
            return None
        try:
            fcntl.flock(manifest, fcntl.LOCK_SH | fcntl.LOCK_NB)
            if os.path.samestat(os.fstat(manifest.fileno()), path.stat()):
                return ContentLock(manifest)
        except OSError:  # somebody is removing it, or has
            pass
        manifest.close()
        return None

    def remove(self, digest: str, *, damaged: bool = False) -> bool:
        """See Contents. Out of sight at once, then from the disk."""
        directory, doomed = self.path(digest), self._staging / uuid.uuid4().hex
        try:
            with (directory / MANIFEST).open() as manifest:
                fcntl.flock(manifest, fcntl.LOCK_EX | fcntl.LOCK_NB)
                directory.rename(doomed)
        except BlockingIOError:
            if not damaged:
                return False
            directory.rename(doomed)
        except FileNotFoundError:  # the object, or only its manifest
            if not directory.is_dir():
                return False
            directory.rename(doomed)
        try:
            sync(self._objects)
        finally:
            shutil.rmtree(doomed, ignore_errors=True)
        return True

    def has(self, digest: str) -> bool:
        """See Contents."""
        return self.path(digest).is_dir()

    def digests(self) -> frozenset[str]:
        """See Contents."""
        names = (PREFIX + folder.name for folder in self._objects.iterdir())
        return frozenset(name for name in names if PATTERN.fullmatch(name))

    def cached_bytes(self) -> None:
        """See Contents."""
        return

    def touch(self, digest: str) -> None:
        """Notes that an object was used."""
        with suppress(OSError):
            os.utime(self.path(digest))

    def by_last_use(self) -> list[tuple[str, int]]:
        """Every object and its bytes, the one used longest ago first."""
        found = []
        for folder in self._objects.iterdir():
            with suppress(OSError):  # it went meanwhile
                size = sum(file.stat().st_size for file in folder.iterdir())
                found.append((folder.stat().st_mtime_ns, PREFIX + folder.name, size))
        return [(digest, size) for _, digest, size in sorted(found) if PATTERN.fullmatch(digest)]

    def staged(self) -> int:
        """Uploads of this process on their way in."""
        return sum(1 for path in self._staging.iterdir() if path.name != ALIVE)

    def close(self) -> None:
        """See Contents."""
        self._alive.close()
        shutil.rmtree(self._staging, ignore_errors=True)

    def path(self, digest: str) -> Path:
        """Where an object lies, or would."""
        assert PATTERN.fullmatch(digest)
        return self._objects / digest.removeprefix(PREFIX)

    def _sweep(self) -> None:
        """Removes the staging of processes that are gone."""
        for folder in self._uploads.iterdir():
            try:
                with (folder / ALIVE).open() as alive:
                    fcntl.flock(alive, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                continue
            except OSError:  # killed before it could lock, or no folder of ours
                pass
            shutil.rmtree(folder, ignore_errors=True)
