"""fsck finds missing, damaged and unnamed content, without a base."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from adaplex.adapters.checkpoint import WEIGHTS, Checkpoint
from adaplex.adapters.digest import content_digest
from adaplex.adapters.formats import FORMATS, identity
from adaplex.adapters.formats.bundle import bundle
from adaplex.adapters.registry.registry import AdapterRegistry
from adaplex.adapters.storage.fsck import check_store
from adapters.handmade import checkpoint, config, files, make_registry, push, tensors


@pytest.fixture
def registry(tmp_path: Path) -> Iterator[AdapterRegistry]:
    made = make_registry(tmp_path)
    yield made
    made.close()


def problems(registry: AdapterRegistry) -> list[str]:
    found = check_store(registry.names._catalog, registry.intake._contents)
    return [f"{problem.kind}: {problem.reason}" for problem in found]


def test_whole_adapters_have_no_problem_whether_or_not_their_digest_takes_the_base(
    registry: AdapterRegistry,
) -> None:
    push(registry, "plain")
    both = bundle([checkpoint(), checkpoint(tensors(seed=3))])
    push(registry, "both", files(both.config, both.tensors))
    assert registry.resolve("both").record.family == "hybrid"
    assert problems(registry) == []


def test_damage_is_found_in_both(registry: AdapterRegistry, tmp_path: Path) -> None:
    both = bundle([checkpoint(), checkpoint(tensors(seed=3))])
    push(registry, "both", files(both.config, both.tensors))
    (stored,) = tmp_path.glob(f"objects/*/{WEIGHTS}")
    stored.chmod(0o644)
    data = bytearray(stored.read_bytes())
    data[-1] ^= 1
    stored.write_bytes(data)
    (problem,) = problems(registry)
    assert problem.startswith("damaged")


def test_the_digest_takes_the_base_only_where_a_format_says_so() -> None:
    plain = Checkpoint(config(), tensors())
    assert identity(plain) == content_digest(plain, FORMATS["LORA"].semantic_fields or ())
    assert identity(Checkpoint({"peft_type": "HYBRID", "parts": []}, {})) is None
    assert identity(Checkpoint({"config": {}, "name": "x"}, {})) is None
