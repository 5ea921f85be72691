"""Modelled seconds of steps by rows, modes, and shares that merging changes."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from adaplex.engine.batch import Batch
from adaplex.engine.merge_cost_model import StepCosts, StepRows
from engine.fakes import digest
from engine.machines import FEW, MACHINES, MERGED, UNMERGED, ZEROS, chunks


def test_costs_between_and_beyond_what_was_measured() -> None:
    costs = StepCosts((2, 4), (1.0, 2.0), (4.0, 5.0), (0.1, 0.1), 0.01)
    assert [costs.step_seconds(StepRows(base=rows)) for rows in (1, 2, 3, 4, 8)] == [
        1,
        1,
        1.5,
        2,
        4,
    ]
    assert costs.step_seconds(StepRows()) == 0.0
    assert costs.step_seconds(StepRows(merged={"a": 3})) == 4.5
    assert costs.step_seconds(StepRows(base=1, merged={"a": 3})) == pytest.approx(4.5 + 2.0)
    assert costs.step_seconds(StepRows(merged={"a": 2, "b": 2})) == pytest.approx(2 * 4.0 + 2.0)
    unmerged = StepRows(base=1, unmerged={"a": 1, "b": 2})
    assert costs.step_seconds(unmerged) == pytest.approx(2.0 + 0.1 + 0.01)


@pytest.mark.parametrize("takes_merged", [False, True])
def test_linears_that_an_adapter_leaves_alone_are_the_bases(takes_merged: bool) -> None:
    costs = StepCosts((1, 11), (1.0, 11.0), (20.0, 20.0), (4.0, 4.0), 2.0, takes_merged)
    merges = {"few": FEW, "zeros": ZEROS}

    def seconds(**rows: Any) -> float:
        return costs.step_seconds(StepRows(**rows), merges)

    assert seconds(unmerged={"few": 2}) == pytest.approx(2.0 + 4.0 / 4)
    assert seconds(unmerged={"few": 1, "zeros": 1}) == pytest.approx(2.0 + (4.0 + 2.0) * 5 / 8)
    assert seconds(merged={"few": 2}) == pytest.approx(20.0 / 4 + 2.0 * 3 / 4)
    assert seconds(merged={"zeros": 2}) == pytest.approx(2.0)
    few, zeros = (5.0, 5.0) if takes_merged else (1.0 / 4 + 5.0 * 3 / 4, 1.0)
    assert seconds(base=1, merged={"few": 4}) == pytest.approx(20.0 / 4 + few)
    assert seconds(base=1, merged={"zeros": 4}) == pytest.approx(4.0 + zeros)
    assert costs.saved("zeros", StepRows(unmerged={"zeros": 2}), merges) == pytest.approx(4.0)
    assert costs.saved("few", StepRows(unmerged={"few": 2}), merges) < 0


def test_rows_of_merged_adapters_may_be_spared_the_base() -> None:
    rows, seconds = (1, 16), (1.0, 16.0)
    flat = StepCosts(rows, seconds, (2.0, 2.0), (0.0, 0.0), 0.0)
    spared = replace(flat, base_takes_merged=False)
    rowsed = StepRows(base=4, merged={"a": 8})
    assert flat.step_seconds(rowsed) == pytest.approx(2.0 + 12.0)
    assert spared.step_seconds(rowsed) == pytest.approx(2.0 + 4.0)
    two = StepRows(merged={"a": 4, "b": 4})
    assert flat.step_seconds(two) == pytest.approx(4.0 + 8.0)
    assert spared.step_seconds(two) == pytest.approx(4.0)
    alone = StepRows(merged={"a": 8})
    assert flat.step_seconds(alone) == spared.step_seconds(alone) == pytest.approx(2.0)


def test_a_rows_counts_rows_by_adapter_and_mode() -> None:
    batch = Batch(
        tuple(
            chunk
            for name, mode, rows in [("a", UNMERGED, 3), ("a", MERGED, 2), ("b", UNMERGED, 1)]
            for chunk in chunks(name, mode, rows)
        )
        + tuple(chunks(None, UNMERGED, 4))
    )
    a, b = digest("a"), digest("b")
    rows = StepRows.of(batch)
    assert rows == StepRows(4, {a: 3, b: 1}, {a: 2})
    assert rows.count(a) == 5
    assert rows.with_mode(a, MERGED) == StepRows(4, {b: 1}, {a: 5})
    assert rows.with_mode(a, UNMERGED) == StepRows(4, {a: 5, b: 1}, {})
    assert rows.with_mode("other", MERGED) == rows


rows_by_adapter = st.dictionaries(st.sampled_from("abcdef"), st.integers(1, 60), max_size=6)


@given(
    rows=st.builds(StepRows, st.integers(0, 60), rows_by_adapter, rows_by_adapter),
    machine=st.sampled_from([*MACHINES.values()]),
    name=st.sampled_from("abcdefg"),
)
def test_what_merging_saves_is_the_difference(
    rows: StepRows, machine: StepCosts, name: str
) -> None:
    unmerged, merged = (
        machine.step_seconds(rows.with_mode(name, mode)) for mode in (UNMERGED, MERGED)
    )
    saved = machine.saved(name, rows)
    assert saved == unmerged - merged
    assert saved < unmerged or not rows.count(name)
    if not rows.count(name):
        assert saved == 0.0
