"""FolderContent: a ContentStore in a folder. An object appears and disappears atomically.

objects/<digest hex>/   adapter_config.json, adapter_model.safetensors, manifest.json; model.sig
staging/<process>/<id>/ unfinished uploads; removed by the next opener once their process has ended
lock                    locked while a process opens the store
names/, catalog.sqlite3 see CopiedCatalog

Several processes may open the same folder. A process that uses an object has a shared `flock` on
its manifest, which ends with the process; removal needs an exclusive one.
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
from adaplex.adapters.errors import AdapterNotFound, CatalogCorrupt, StoreCorrupt
from adaplex.adapters.storage.content_store import ContentLock
from adaplex.adapters.storage.staging import FileSpec, Staging

MANIFEST = "manifest.json"
STAGING = "staging"
ALIVE = "alive"
"""File in a process's staging folder, locked as long as the process lives."""


class FolderContent:
    """See ContentStore. Which objects are needed is up to the catalog."""

    def __init__(self, root: Path) -> None:
        """Opens or makes the store. Removes the staging folders of processes that have ended."""
        self._objects = root / "objects"
        self._uploads = root / STAGING
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
        """See ContentStore. Raises CatalogCorrupt if the store was removed."""
        self._check_there()
        return Staging(self._staging / uuid.uuid4().hex, files)

    def scratch_folder(self) -> Path:
        """See ContentStore. Raises CatalogCorrupt if the store was removed."""
        self._check_there()
        folder = self._staging / uuid.uuid4().hex
        folder.mkdir()
        return folder

    def add(self, staging: Staging, digest: str) -> bool:
        """See ContentStore."""
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
        except OSError as error:  # another thread stored the same content
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                raise
            staging.discard()
            return False
        return True

    def open(self, digest: str) -> Path:
        """See ContentStore."""
        directory = self.path(digest)
        if not directory.is_dir():
            raise AdapterNotFound(f"{digest} is not in the store")
        try:
            files = json.loads((directory / MANIFEST).read_text())["files"]
            for name in dict.fromkeys([*FILES, *files]):
                found = file_sha256(directory / name)
                if found != files[name]["sha256"]:
                    raise StoreCorrupt(
                        f"{digest}: {name} has SHA-256 {found}, stored was {files[name]['sha256']}"
                    )
        except (OSError, ValueError, KeyError, TypeError) as error:
            if not directory.is_dir():
                raise AdapterNotFound(f"{digest} was removed while it was read") from error
            raise StoreCorrupt(f"{digest}: {error}") from error
        return directory

    def lock(self, digest: str) -> ContentLock | None:
        """See ContentStore."""
        path = self.path(digest) / MANIFEST
        try:
            manifest = path.open()
        except OSError:
            return None
        try:
            fcntl.flock(manifest, fcntl.LOCK_SH | fcntl.LOCK_NB)
            if os.path.samestat(os.fstat(manifest.fileno()), path.stat()):
                return ContentLock(manifest)
        except OSError:  # another process is removing the object, or has
            pass
        manifest.close()
        return None

    def remove(self, digest: str, *, damaged: bool = False) -> bool:
        """See ContentStore. Renames the object away first, then deletes its files."""
        directory, doomed = self.path(digest), self._staging / uuid.uuid4().hex
        try:
            with (directory / MANIFEST).open() as manifest:
                fcntl.flock(manifest, fcntl.LOCK_EX | fcntl.LOCK_NB)
                directory.rename(doomed)
        except BlockingIOError:
            if not damaged:
                return False
            directory.rename(doomed)
        except FileNotFoundError:  # the object is absent, or only its manifest is
            if not directory.is_dir():
                return False
            directory.rename(doomed)
        try:
            sync(self._objects)
        finally:
            shutil.rmtree(doomed, ignore_errors=True)
        return True

    def has(self, digest: str) -> bool:
        """See ContentStore."""
        return self.path(digest).is_dir()

    def digests(self) -> frozenset[str]:
        """See ContentStore."""
        names = (PREFIX + folder.name for folder in self._objects.iterdir())
        return frozenset(name for name in names if PATTERN.fullmatch(name))

    def cached_bytes(self) -> None:
        """See ContentStore."""
        return

    def touch(self, digest: str) -> None:
        """Marks an object as used now, for `by_last_use`."""
        with suppress(OSError):
            os.utime(self.path(digest))

    def by_last_use(self) -> list[tuple[str, int]]:
        """Returns the digest and bytes of every object, least recently used first."""
        found = []
        for folder in self._objects.iterdir():
            with suppress(OSError):  # removed since it was listed
                size = sum(file.stat().st_size for file in folder.iterdir())
                found.append((folder.stat().st_mtime_ns, PREFIX + folder.name, size))
        return [(digest, size) for _, digest, size in sorted(found) if PATTERN.fullmatch(digest)]

    def staged(self) -> int:
        """Number of unfinished uploads of this process."""
        return sum(1 for path in self._staging.iterdir() if path.name != ALIVE)

    def close(self) -> None:
        """See ContentStore."""
        self._alive.close()
        shutil.rmtree(self._staging, ignore_errors=True)

    def path(self, digest: str) -> Path:
        """Returns the folder of an object, whether it exists or not."""
        assert PATTERN.fullmatch(digest)
        return self._objects / digest.removeprefix(PREFIX)

    def _check_there(self) -> None:
        """Raises CatalogCorrupt if the folders of the store were removed while it was open."""
        if not (self._staging.is_dir() and self._objects.is_dir()):
            raise CatalogCorrupt(
                "the folder of the store was removed while it was open; start the server again"
            )

    def _sweep(self) -> None:
        """Removes the staging folders of processes that have ended."""
        for folder in self._uploads.iterdir():
            if not _is_alive(folder):
                shutil.rmtree(folder, ignore_errors=True)


def is_used(root: Path) -> bool:
    """Returns True if a process has opened the store in a folder and not closed it."""
    uploads = root / STAGING
    return uploads.is_dir() and any(map(_is_alive, uploads.iterdir()))


def _is_alive(folder: Path) -> bool:
    """Returns True if the process of a staging folder lives."""
    try:
        with (folder / ALIVE).open() as alive:
            fcntl.flock(alive, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:  # killed before it locked, or another program's folder
        pass
    return False
