"""Adapters that can only be served merged."""

from __future__ import annotations

import pytest

from adaplex.engine.errors import RequestInvalid
from adaplex.engine.request import AdapterMode
from engine.fakes import make_adapter, make_engine, make_request, run_all


@pytest.mark.parametrize("mode", [AdapterMode.UNMERGED, AdapterMode.AUTO])
def test_any_other_mode_is_refused(mode: AdapterMode) -> None:
    engine, _ = make_engine(merged_bytes=200)
    only = make_adapter("only", mode=mode, merged_only=True)
    with pytest.raises(RequestInvalid, match="only can only be served merged") as refusal:
        engine.add(make_request(adapter=only))
    assert refusal.value.field == "mode"


def test_they_ask_for_nothing_in_the_arena() -> None:
    engine, runner = make_engine(merged_bytes=200)
    merged = make_adapter("only", nbytes=1 << 40, mode=AdapterMode.MERGED, merged_only=True)
    run_all(engine, [make_request(adapter=merged)])
    assert not runner.extents


def test_a_server_without_merged_weights_refuses_them() -> None:
    engine, _ = make_engine()
    only = make_adapter("only", mode=AdapterMode.MERGED, merged_only=True)
    with pytest.raises(RequestInvalid, match="keeps no merged weights; adapter only"):
        engine.add(make_request(adapter=only))
