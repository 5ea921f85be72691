"""The table of mutants fits the tree, and the tool tells caught mutants from surviving ones."""

from __future__ import annotations

from pathlib import Path

import pytest

from tools import mutants
from tools.mutants import MUTANTS, ROOT, Mutant, Outcome, named_tests, selected, try_mutant


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name)
def test_a_mutant_changes_one_place_and_names_tests_that_exist(mutant: Mutant) -> None:
    assert (ROOT / mutant.file).read_text().count(mutant.old) == 1
    assert mutant.old != mutant.new
    for test in mutant.tests:
        file, _, name = test.partition("::")
        assert f"def {name}" in (ROOT / file).read_text()


def test_names_are_unique_and_select() -> None:
    assert len({mutant.name for mutant in MUTANTS}) == len(MUTANTS)
    assert {mutant.slow for mutant in selected([], fast=True)} == {False}
    assert [mutant.file for mutant in selected(["CACHE SALT"], fast=False)] == [
        "server/adaplex/engine/block_manager.py"
    ]
    assert len(named_tests(MUTANTS)) < sum(len(mutant.tests) for mutant in MUTANTS)


@pytest.mark.parametrize(
    ("old", "new", "outcome"),
    [
        ("a + b", "a - b", Outcome.CAUGHT),
        ("a + b", "b + a", Outcome.SURVIVED),
        ("a * b", "a - b", Outcome.NOT_FOUND),
        ("a + b", "a +", Outcome.NOT_RUN),
    ],
)
def test_outcomes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, old: str, new: str, outcome: Outcome
) -> None:
    source = "def add(a, b):\n    return a + b\n"
    (tmp_path / "code").mkdir()
    (tmp_path / "code" / "sums.py").write_text(source)
    (tmp_path / "test_sums.py").write_text(
        "from sums import add\n\ndef test_add():\n    assert add(2, 3) == 5\n"
    )
    monkeypatch.setattr(mutants, "SOURCES", ("code",))
    mutant = Mutant("sum", "code/sums.py", old, new, ("test_sums.py",))
    assert try_mutant(tmp_path, mutant) is outcome
    assert (tmp_path / "code" / "sums.py").read_text() == source
