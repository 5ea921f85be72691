"""Repeats operations on a store, killed at the first write, the second and so on. For test_kill.

Runs under kill_at_write.so; forks a child for each kill, since importing torch takes seconds.
Prints a JSON line: for each operation, its number of writes and the problems after a kill.
"""

from __future__ import annotations

import ctypes
import json
import os
import shutil
import signal
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import torch

from adaplex.adapters.errors import AdapterNotFound
from adaplex.adapters.registry.registry import AdapterRegistry
from adaplex.adapters.storage.alias_split import Target
from adaplex.adapters.storage.fsck import check_store
from adapters.handmade import UPLOAD, make_registry, push, staged

MAX_WRITES = 2000


def flip(registry: AdapterRegistry) -> None:
    registry.names.set_alias("a", "default", [Target(1, 95), Target(2, 5)], UPLOAD)


OPERATIONS: dict[str, Callable[[AdapterRegistry], object]] = {
    "upload": lambda registry: push(registry, "new", seed=7),
    "replace": lambda registry: push(registry, "a", seed=8, replace=True),
    "flip": flip,
    "rollback": lambda registry: registry.names.rollback("a", "prod", UPLOAD),
    "delete_version": lambda registry: registry.names.delete("a@2", UPLOAD),
    "delete": lambda registry: registry.names.delete("b", UPLOAD),
}


def template(root: Path) -> None:
    """Makes a store with two names, four contents and an alias."""
    registry = make_registry(root)
    push(registry, "a", seed=0)
    push(registry, "a", seed=1, replace=True)
    push(registry, "a", seed=2, replace=True)
    push(registry, "b", seed=3)
    registry.names.set_alias("a", "prod", [Target(1)], UPLOAD)
    registry.names.set_alias("a", "prod", [Target(3)], UPLOAD)
    registry.close()


def state(registry: AdapterRegistry) -> dict[str, object]:
    """Returns the versions and aliases of each name."""
    found: dict[str, object] = {}
    for name in ("a", "b", "new"):
        with suppress(AdapterNotFound):
            entry = registry.names.entry(name)
            found[name] = [(v.number, v.digest) for v in entry.versions], dict(entry.aliases)
    return found


def killed_at(root: Path, operation: str, number: int) -> bool:
    """Runs an operation in a child that is killed at write `number`. Returns True if it was."""
    child = os.fork()
    if child == 0:
        libc = ctypes.CDLL(None)
        registry = make_registry(root)
        libc.kill_at_write(ctypes.c_long(number))
        OPERATIONS[operation](registry)
        libc.kill_at_write(ctypes.c_long(0))
        os._exit(0)
    _, status = os.waitpid(child, 0)
    if os.WIFSIGNALED(status):
        assert os.WTERMSIG(status) == signal.SIGKILL
        return True
    assert os.WEXITSTATUS(status) == 0, f"{operation} failed"
    return False


def problems_after_kill(root: Path, before: object, after: object, operation: str) -> list[str]:
    """Returns the problems of a store after a kill and a restart."""
    wrong = []
    registry = make_registry(root)
    try:
        registry.check_integrity()
        found = check_store(registry.names._catalog, registry.intake._contents)
        wrong += [f"fsck: {problem}" for problem in found]
        if staged(root):
            wrong.append("something is still staged")
        if state(registry) not in (before, after):
            wrong.append(f"neither before nor after: {state(registry)}")
        for digest in registry.names._catalog.digests():
            registry.programs.program(digest)
        if state(registry) == before:
            OPERATIONS[operation](registry)
            if state(registry) != after:
                wrong.append("cannot be done afterwards")
    finally:
        registry.close()
    return wrong


def main(work: Path) -> None:
    torch.set_num_threads(1)
    template(work / "template")
    report: dict[str, dict[str, object]] = {}
    for operation, act in OPERATIONS.items():
        root = work / "whole"
        shutil.copytree(work / "template", root)
        registry = make_registry(root)
        before = state(registry)
        act(registry)
        after = state(registry)
        registry.close()
        shutil.rmtree(root)
        assert before != after
        wrong: list[str] = []
        for number in range(1, MAX_WRITES):
            shutil.copytree(work / "template", root)
            killed = killed_at(root, operation, number)
            wrong += [
                f"at {number}: {it}" for it in problems_after_kill(root, before, after, operation)
            ]
            shutil.rmtree(root)
            if not killed:
                break
        report[operation] = {"writes": number - 1, "wrong": wrong}
    print(json.dumps(report))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
