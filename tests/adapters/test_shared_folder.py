"""Several processes on one store in a folder."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from adaplex.adapters.registry.registry import AdapterRegistry
from adaplex.adapters.storage.alias_split import Target
from adapters.handmade import (
    UPLOAD,
    digest_of,
    files,
    make_registry,
    objects,
    push,
    stage,
)

OTHER_PROCESS = """
import sys
from pathlib import Path
from adapters.handmade import UPLOAD, make_registry, push
registry = make_registry(Path(sys.argv[1]))
leases = []
for line in sys.stdin:
    words = line.split()
    if words[0] == "lease":
        leases.append(registry.resolve(words[1]))
    elif words[0] == "release":
        leases.pop().release()
    elif words[0] == "push":
        push(registry, words[1], seed=int(words[2]), replace=True)
    elif words[0] == "delete":
        registry.names.delete(words[1], UPLOAD)
    elif words[0] == "stage":
        from adapters.handmade import files, stage
        stage(registry, files())
    print("done", flush=True)
"""


class Other:
    """Another process on the same store."""

    def __init__(self, root: Path) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", OTHER_PROCESS, str(root)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={"PYTHONPATH": ":".join(sys.path)},
        )

    def do(self, *words: object) -> None:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(" ".join(map(str, words)) + "\n")
        self.process.stdin.flush()
        assert self.process.stdout.readline() == "done\n"

    def kill(self) -> None:
        self.process.kill()
        self.process.communicate()


def test_two_processes_share_a_store(registry: AdapterRegistry, tmp_path: Path) -> None:
    other = Other(tmp_path / "store")
    other.do("push", "a", 0)
    first = digest_of(registry, "a")
    other.do("push", "a", 1)
    second = digest_of(registry, "a")
    assert first != second
    registry.names.set_alias("a", "default", [Target(1)], UPLOAD)
    other.do("lease", "a")
    registry.names.delete("a", UPLOAD)
    assert objects(tmp_path / "store") == {first}, "the other process still uses it"
    assert registry.garbage.sweep() == frozenset()
    other.do("release")
    assert objects(tmp_path / "store") == set()
    other.kill()


def test_what_a_killed_process_held_is_collected(registry: AdapterRegistry, tmp_path: Path) -> None:
    digest = push(registry, "a").record.digest
    other = Other(tmp_path / "store")
    other.do("lease", "a")
    other.do("stage")
    registry.names.delete("a", UPLOAD)
    assert registry.garbage.sweep() == frozenset()
    other.kill()
    assert registry.garbage.sweep() == {digest}
    make_registry(tmp_path / "store").close()  # opening sweeps what was staged


def test_a_second_process_leaves_uploads_under_way_alone(
    registry: AdapterRegistry, tmp_path: Path
) -> None:
    with stage(registry, files()) as staging:
        make_registry(tmp_path / "store").close()
        assert registry.intake.commit(staging, "a", replace=False, origin=UPLOAD).created
