"""The generated documents, by their paths in the repository."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from tools.docs import errors, metrics, protocol, settings

DOCUMENTS: dict[str, Callable[[], str]] = {
    "server/SETTINGS.md": settings.document,
    "server/METRICS.md": metrics.document,
    "server/ERRORS.md": errors.document,
    "protos/API.md": protocol.document,
}


def write(root: Path) -> None:
    """Writes every document under `root`."""
    for name, document in DOCUMENTS.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(document(), encoding="utf-8")


def outdated(root: Path) -> list[str]:
    """Returns the documents under `root` that are missing or differ from the code."""
    return [name for name, document in DOCUMENTS.items() if _read(root / name) != document()]


def _read(path: Path) -> str | None:
    return path.read_text(encoding="utf-8") if path.is_file() else None
