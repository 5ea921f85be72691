"""Registries that are checked at the end of the test, and bases to lower for."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path

import pytest
from transformers import PreTrainedModel

from adaplex.adapters.program.base_spec import BaseSpec
from adaplex.adapters.registry.registry import AdapterRegistry
from adapters.handmade import make_registry, staged
from adapters.replicas import replica
from peft_adapters import load_plain
from primitives import describe


@pytest.fixture
def registry(tmp_path: Path) -> Iterator[AdapterRegistry]:
    """A registry for fp32. After the test it must have no orphan and nothing staged."""
    made = make_registry(tmp_path / "store")
    yield made
    made.check_integrity()
    assert made.garbage.orphans() == frozenset()
    assert staged(tmp_path / "store") == []
    made.close()


@pytest.fixture
def replicas(s3_prefix: str, tmp_path: Path) -> Iterator[tuple[AdapterRegistry, AdapterRegistry]]:
    """The registries of two servers that share a bucket."""
    made = replica(s3_prefix, tmp_path / "one"), replica(s3_prefix, tmp_path / "two")
    yield made
    for registry in made:
        registry.check_integrity()
        registry.close()


@pytest.fixture(scope="module")
def base(tiny_model: Callable[[str], Path]) -> Callable[[str], tuple[PreTrainedModel, BaseSpec]]:
    """Returns a tiny model of an architecture and its spec, made once."""

    @cache
    def load(architecture: str) -> tuple[PreTrainedModel, BaseSpec]:
        model = load_plain(tiny_model(architecture))
        return model, describe(model, architecture)

    return load


@pytest.fixture(scope="module")
def llama(base: Callable[[str], tuple[PreTrainedModel, BaseSpec]]) -> BaseSpec:
    """The spec of a tiny llama."""
    return base("llama")[1]
