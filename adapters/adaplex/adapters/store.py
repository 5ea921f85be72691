"""AdapterStore: adapters on disk, by content. An object is there whole or not at all.

objects/<digest hex>/   adapter_config.json, adapter_model.safetensors, manifest.json
staging/<id>/           uploads on their way in; emptied when the store is opened
"""

from __future__ import annotations

import fcntl
import json
import shutil
import uuid
from collections.abc import Sequence
from pathlib import Path

from adaplex.adapters.checkpoint import FILES
from adaplex.adapters.digest import PATTERN, PREFIX
from adaplex.adapters.errors import AdapterError, AdapterNotFound, StoreCorrupt
from adaplex.adapters.files import file_sha256, publish, sync
from adaplex.adapters.staging import FileSpec, Staging

MANIFEST = "manifest.json"


class AdapterStore:
    """The files. Which of them are wanted is the catalog's knowledge."""

    def __init__(self, root: Path) -> None:
        """Raises AdapterError when another process has the store open."""
        self._lock = (root / "lock").open("w")
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            self._lock.close()
            raise AdapterError(f"{root} is in use by another process", field="store_dir") from None
        self._objects = root / "objects"
        self._staging = root / "staging"
        shutil.rmtree(self._staging, ignore_errors=True)
        for folder in (self._objects, self._staging):
            folder.mkdir(parents=True, exist_ok=True)
        sync(root)

    def stage(self, files: Sequence[FileSpec]) -> Staging:
        """An empty staging folder for files that were checked."""
        return Staging(self._staging / uuid.uuid4().hex, files)

    def take(self, staging: Staging, digest: str) -> bool:
        """Moves verified files in under their digest; an object that is there already stays.
        Whether they were moved.
        """
        target = self.path(digest)
        if target.exists():
            staging.discard()
            return False
        manifest = {file.name: {"size": file.size, "sha256": file.sha256} for file in staging.files}
        path = staging.directory / MANIFEST
        path.write_text(json.dumps({"digest": digest, "files": manifest}, indent=1))
        sync(path)
        publish(staging.directory, target)
        return True

    def open(self, digest: str) -> Path:
        """The folder of an object whose files are what they were. Raises StoreCorrupt or
        AdapterNotFound.
        """
        directory = self.path(digest)
        if not directory.is_dir():
            raise AdapterNotFound(f"{digest} is not in the store")
        try:
            files = json.loads((directory / MANIFEST).read_text())["files"]
            for name in FILES:
                found = file_sha256(directory / name)
                if found != files[name]["sha256"]:
                    raise StoreCorrupt(f"{digest}: {name} has SHA-256 {found}, not as stored")
        except (OSError, ValueError, KeyError, TypeError) as error:
            if not directory.is_dir():
                raise AdapterNotFound(f"{digest} was removed meanwhile") from error
            raise StoreCorrupt(f"{digest}: {error}") from error
        return directory

    def is_damaged(self, digest: str) -> bool:
        """Whether an object is there, but not as it was stored."""
        try:
            self.open(digest)
        except StoreCorrupt:
            return True
        except AdapterNotFound:
            return False
        return False

    def remove(self, digest: str) -> None:
        """Removes an object: out of sight at once, then from the disk."""
        doomed = self._staging / uuid.uuid4().hex
        try:
            self.path(digest).rename(doomed)
        except FileNotFoundError:
            return
        try:
            sync(self._objects)
        finally:
            shutil.rmtree(doomed, ignore_errors=True)

    def has(self, digest: str) -> bool:
        """Whether an object is there, in whatever state."""
        return self.path(digest).is_dir()

    def digests(self) -> frozenset[str]:
        """Every object that is there."""
        names = (PREFIX + folder.name for folder in self._objects.iterdir())
        return frozenset(name for name in names if PATTERN.fullmatch(name))

    def staged(self) -> int:
        """Uploads on their way in."""
        return sum(1 for _ in self._staging.iterdir())

    def close(self) -> None:
        """Lets another process open the store."""
        self._lock.close()

    def path(self, digest: str) -> Path:
        """Where an object lies, or would."""
        assert PATTERN.fullmatch(digest)
        return self._objects / digest.removeprefix(PREFIX)
