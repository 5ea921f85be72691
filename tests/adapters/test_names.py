"""Names through the registry: versions, aliases, splits, labels and history."""

from __future__ import annotations

from pathlib import Path

import pytest

from adaplex.adapters.errors import (
    AdapterInvalid,
    AdapterNotFound,
    StoreFull,
)
from adaplex.adapters.limits import AdapterLimits
from adaplex.adapters.registry.registry import AdapterRegistry
from adaplex.adapters.storage.alias_split import Target
from adapters.handmade import (
    UPLOAD,
    digest_of,
    make_registry,
    objects,
    push,
)


def versions(registry: AdapterRegistry, count: int = 3) -> list[str]:
    return [push(registry, "a", seed=i, replace=True).record.digest for i in range(count)]


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
    digest_by_key = {key: digest_of(registry, "a@prod", key) for key in map(str, range(40))}
    assert set(digest_by_key.values()) == {one, two}
    assert digest_by_key == {key: digest_of(registry, "a@prod", key) for key in digest_by_key}
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
