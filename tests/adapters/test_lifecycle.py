"""Names through the registry: aliases, flips, history, single versions, several processes."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from adaplex.adapters.errors import (
    AdapterInvalid,
    AdapterNotFound,
    BaseMismatch,
    StoreFull,
)
from adaplex.adapters.limits import AdapterLimits
from adaplex.adapters.program.base_match import BasePolicy
from adaplex.adapters.registry.registry import AdapterRegistry
from adaplex.adapters.storage.alias_split import Target
from adapters.handmade import (
    UPLOAD,
    config,
    files,
    make_base,
    make_registry,
    objects,
    push,
    tensors,
)


def versions(registry: AdapterRegistry, count: int = 3) -> list[str]:
    return [push(registry, "a", seed=i, replace=True).record.digest for i in range(count)]


def digest_of(registry: AdapterRegistry, selector: str, key: str = "") -> str:
    with registry.resolve(selector, routing_key=key) as lease:
        return lease.record.digest


def test_requests_follow_a_flip_at_once_and_running_ones_do_not(registry: AdapterRegistry) -> None:
    one, two, three = versions(registry)
    registry.names.set_alias("a", "default", [Target(1)], UPLOAD)
    with registry.resolve("a") as running:
        registry.names.set_alias("a", "default", [Target(2)], UPLOAD)
        assert running.record.digest == one
        assert digest_of(registry, "a") == two
    assert digest_of(registry, "a@latest") == three
    assert digest_of(registry, "a@default") == two
    registry.names.rollback("a", "default", UPLOAD)
    assert digest_of(registry, "a") == one
    registry.names.delete_alias("a", "default", UPLOAD)
    assert digest_of(registry, "a") == three


def test_a_split_is_sticky_by_key(registry: AdapterRegistry) -> None:
    one, two, _ = versions(registry)
    registry.names.set_alias("a", "prod", [Target(1, 1), Target(2, 1)], UPLOAD)
    sides = {key: digest_of(registry, "a@prod", key) for key in map(str, range(40))}
    assert set(sides.values()) == {one, two}
    assert sides == {key: digest_of(registry, "a@prod", key) for key in sides}
    with registry.resolve("a@prod") as lease:
        assert lease.record.alias == "prod"


def test_a_version_can_go_alone(registry: AdapterRegistry, tmp_path: Path) -> None:
    one, two, three = versions(registry)
    registry.names.set_alias("a", "prod", [Target(1)], UPLOAD)
    with pytest.raises(AdapterInvalid, match="a@prod points to version 1"):
        registry.names.delete("a@1", UPLOAD)
    deleted = registry.names.delete("a@2", UPLOAD)
    assert (deleted.versions, deleted.digests) == (1, (two,))
    assert objects(tmp_path / "store") == {one, three}
    for selector in ("a@2", "a@prod2", two):
        with pytest.raises(AdapterNotFound):
            registry.resolve(selector)
    for bad in ("a@prod", "a@latest", one, "a@9"):
        with pytest.raises(AdapterNotFound):
            registry.names.delete(bad, UPLOAD)


def test_history_says_who_did_what_also_of_the_dead(registry: AdapterRegistry) -> None:
    versions(registry, 2)
    registry.names.update("a", UPLOAD, description="d", set_labels={"k": "v"}, pinned=True)
    registry.names.delete("a@1", UPLOAD)
    registry.names.delete("a", UPLOAD)
    kinds = [event.kind for event in registry.names.history("a")]
    assert kinds == ["delete", "delete_version", "update", "upload", "upload"]
    assert {event.actor for event in registry.names.history("a")} == {"ada"}
    assert registry.names.history("a")[-1].source == "upload"
    with pytest.raises(AdapterNotFound):
        registry.names.history("b")


def test_labels_are_set_and_removed(registry: AdapterRegistry) -> None:
    push(registry, "a")
    registry.names.update("a", UPLOAD, set_labels={"k": "v", "l": "w"})
    entry = registry.names.update("a", UPLOAD, set_labels={"k": "x"}, remove_labels=["l", "m"])
    assert entry.labels == {"k": "x"}
    with pytest.raises(AdapterNotFound):
        registry.names.update("b", UPLOAD, description="d")


@pytest.mark.parametrize("name", ["", "..", "../a", "a/b", "a@1", "a" * 129, "ü", "a\0"])
def test_what_is_no_name_is_not_found_by_any_operation(
    registry: AdapterRegistry, name: str
) -> None:
    push(registry, "a")
    names = registry.names
    for operation in (
        lambda: names.entry(name),
        lambda: names.history(name),
        lambda: names.reachable(name),
        lambda: names.update(name, UPLOAD, description="x"),
        lambda: names.set_alias(name, "prod", [Target(1)], UPLOAD),
        lambda: names.delete_alias(name, "prod", UPLOAD),
        lambda: names.rollback(name, "prod", UPLOAD),
    ):
        with pytest.raises(AdapterNotFound):
            operation()
    assert not names.exists(name)


def test_versions_are_bounded(tmp_path: Path) -> None:
    registry = make_registry(tmp_path, limits=AdapterLimits(max_versions=2))
    versions(registry, 2)
    with pytest.raises(StoreFull) as caught:
        push(registry, "a", seed=9, replace=True)
    assert caught.value.field == "max_versions"
    assert len(objects(tmp_path)) == 2
    registry.close()


NAMED = config(base_model_name_or_path="org/other-base")


def test_another_base_by_name(tmp_path: Path) -> None:
    for policy, warned in ((BasePolicy.OFF, False), (BasePolicy.WARN, True)):
        registry = make_registry(tmp_path / policy, base_policy=policy)
        done = push(registry, "a", files(NAMED))
        with registry.resolve("a") as lease:
            assert bool(lease.warnings) == bool(done.report.warnings) == warned
        assert not push(registry, "b", files(config(base_model_name_or_path=None))).report.warnings
        ours = config(base_model_name_or_path="/models/Tiny-Base/")
        assert not push(registry, "c", files(ours)).report.warnings
        registry.close()
    registry = make_registry(tmp_path / "refuse", base_policy=BasePolicy.REFUSE)
    with pytest.raises(AdapterInvalid) as caught:
        push(registry, "a", files(NAMED))
    assert caught.value.field == "base_model_name_or_path"
    registry.close()


def test_another_base_by_fingerprint(tmp_path: Path) -> None:
    base = make_base(fingerprint="sha256:" + "a" * 64)
    registry = make_registry(tmp_path, base, base_policy=BasePolicy.REFUSE)
    right = config(base_model_name_or_path="x/other", base_model_fingerprint=base.fingerprint)
    taken = push(registry, "a", files(right))
    assert taken.record.base == base.fingerprint
    assert taken.report.notes == ("trained on the base that is served, by its fingerprint",)
    wrong = config(base_model_name_or_path=base.name, base_model_fingerprint="sha256:" + "b" * 64)
    with pytest.raises(AdapterInvalid) as caught:
        push(registry, "b", files(wrong, tensors(seed=1)))
    assert caught.value.field == "base_model_fingerprint"
    registry.close()


def test_another_quantization(tmp_path: Path) -> None:
    base = replace(make_base(), quantization="nf4")
    registry = make_registry(tmp_path / "warn", base, base_policy=BasePolicy.WARN)
    for name, kept, warned in (("a", "int8", True), ("b", "NF4", False), ("c", None, False)):
        report = push(registry, name, files(config(base_model_quantization=kept))).report
        kept_as = (f"trained on a base stored as {kept}",) if kept else ()
        said = () if warned else ("does not name the base that it was trained on",)
        assert report.notes == (*kept_as, *said)
        expected = "base_model_quantization is 'int8', the base that is served is 'nf4'"
        assert report.warnings == ((expected,) if warned else ())
    registry.close()
    registry = make_registry(tmp_path / "refuse", base, base_policy=BasePolicy.REFUSE)
    with pytest.raises(AdapterInvalid) as caught:
        push(registry, "a", files(config(base_model_quantization="int8")))
    assert caught.value.field == "base_model_quantization"
    registry.close()


def test_the_base_changes_under_a_store(tmp_path: Path) -> None:
    before, after = (make_base(fingerprint=f"sha256:{letter * 64}") for letter in "ab")
    registry = make_registry(tmp_path, before)
    push(registry, "a")
    registry.close()
    for policy in (BasePolicy.OFF, BasePolicy.WARN):
        registry = make_registry(tmp_path, after, base_policy=policy)
        with registry.resolve("a") as lease:
            assert bool(lease.warnings) == (policy is BasePolicy.WARN)
        registry.close()
    registry = make_registry(tmp_path, after, base_policy=BasePolicy.REFUSE)
    with pytest.raises(BaseMismatch, match="checked against the base sha256:aaa"):
        registry.resolve("a")
    assert registry.leased == 0
    registry.close()


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
    from adapters.handmade import stage

    with stage(registry, files()) as staging:
        make_registry(tmp_path / "store").close()
        assert registry.intake.commit(staging, "a", replace=False, origin=UPLOAD).created


def test_combinations(registry: AdapterRegistry) -> None:
    push(registry, "a", seed=0)
    push(registry, "b", seed=1)
    with registry.resolve_mix([("a", 0.7), ("b", 0.3)]) as lease:
        record = lease.record
        assert (record.name, record.version, record.family) == ("a+b", 0, "combination")
        assert [(p.record.name, p.weight) for p in lease.parts] == [("a", 0.7), ("b", 0.3)]
        program = registry.programs.program(record.digest)
        assert program.packed_bytes(4) == record.packed_bytes
        assert program.traits.max_rank == record.traits.max_rank == 4
        assert len(program.modules) == record.traits.modules
        with registry.resolve_mix([("b", 0.3), ("a", 0.7)]) as same:
            assert same.record.digest == record.digest
        registry.names.delete("a", UPLOAD)
        assert registry.programs.program(record.digest).digest == record.digest
    with pytest.raises(AdapterNotFound):
        registry.programs.program(record.digest)
    assert registry.leased == 0


def test_a_combination_of_one_with_weight_one_is_that_adapter(registry: AdapterRegistry) -> None:
    digest = push(registry, "a").record.digest
    for parts in ([("a", 1.0)], [("a", 0.25), ("a@1", 0.75)]):
        with registry.resolve_mix(parts) as lease:
            assert lease.record.digest == digest
    assert registry.leased == 0


def test_releasing_a_combination_tells_what_can_leave_the_memory(registry: AdapterRegistry) -> None:
    a, b = (push(registry, name, seed=i).record.digest for i, name in enumerate("ab"))
    lease = registry.resolve_mix([("a", 0.5), ("b", 0.5)])
    registry.names.delete("a", UPLOAD)
    assert set(lease.release()) == {a, lease.record.digest}
    assert registry.programs.program(b).digest == b


@pytest.mark.parametrize(
    "parts", [[("a", float("nan"))], [("a", 11.0)], [("a", 0.0)], [("a", 1.0)] * 9]
)
def test_bad_combinations(registry: AdapterRegistry, parts: list[tuple[str, float]]) -> None:
    push(registry, "a")
    with pytest.raises(AdapterInvalid):
        registry.resolve_mix(parts)
    with pytest.raises(AdapterNotFound):
        registry.resolve_mix([("a", 0.5), ("nobody", 0.5)])
    assert registry.leased == 0
