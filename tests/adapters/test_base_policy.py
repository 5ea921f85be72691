"""Adapters of another base, by each --base-policy."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from adaplex.adapters.errors import (
    AdapterInvalid,
    BaseMismatch,
)
from adaplex.adapters.program.base_match import BasePolicy
from adapters.handmade import (
    config,
    files,
    make_base,
    make_registry,
    push,
    tensors,
)

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
