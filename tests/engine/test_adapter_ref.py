from __future__ import annotations

from datetime import UTC, datetime

import pytest

from adaplex.adapters.program.traits import AdapterTraits
from adaplex.adapters.storage.adapter_record import AdapterRecord
from adaplex.engine.errors import RequestInvalid
from adaplex.engine.request import AdapterMode, AdapterRef


def record(*, merged_only: bool = False) -> AdapterRecord:
    return AdapterRecord(
        name="poet",
        version=3,
        digest="sha256:poet",
        family="lora",
        traits=AdapterTraits(modules=4, merged_only=merged_only),
        stored_bytes=100,
        packed_bytes=64,
        created=datetime(2026, 1, 1, tzinfo=UTC),
    )


@pytest.mark.parametrize("mode", [None, *AdapterMode])
def test_a_ref_has_the_requested_mode_or_the_default(mode: AdapterMode | None) -> None:
    ref = AdapterRef.of(record(), mode, default=AdapterMode.AUTO)
    assert ref.mode is (mode or AdapterMode.AUTO)
    assert (ref.name, ref.version, ref.digest) == ("poet", 3, "sha256:poet")
    assert (ref.packed_bytes, ref.traits) == (64, AdapterTraits(modules=4))
    assert AdapterRef.of(record()).mode is AdapterMode.UNMERGED


@pytest.mark.parametrize("mode", [None, AdapterMode.MERGED, AdapterMode.AUTO])
def test_what_can_only_be_merged_is_merged(mode: AdapterMode | None) -> None:
    assert AdapterRef.of(record(merged_only=True), mode).mode is AdapterMode.MERGED


def test_what_can_only_be_merged_is_refused_unmerged() -> None:
    with pytest.raises(RequestInvalid, match="poet can only be served merged") as refusal:
        AdapterRef.of(record(merged_only=True), AdapterMode.UNMERGED)
    assert refusal.value.field == "spec.mode"
