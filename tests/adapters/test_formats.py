"""The table of families is complete, says what formats do, and is the one in FAMILIES.md."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields
from pathlib import Path

import pytest
from peft import PeftConfig, PeftType
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

from adaplex.adapters.errors import AdapterInvalid
from adaplex.adapters.formats import FORMATS, NEEDS, lower, table
from adaplex.adapters.formats.lowering_context import COMMON_FIELDS, TARGET_FIELDS
from adaplex.adapters.formats.peft.kinds import KINDS, PeftKind
from adaplex.adapters.formats.peft.merged_only import TRAINING_ONLY, UNSUPPORTED
from adaplex.adapters.limits import AdapterLimits
from adaplex.model.base.loader import load_base
from adapters.handmade import BASE, checkpoint
from peft_families import FAMILIES
from rig import lowered
from tools import families_table

PAGE = Path(__file__).parents[2] / "adapters" / "FAMILIES.md"
PRIMITIVES = {
    *("low-rank", "bias", "output scale", "input scale", "replaced weight", "replaced rows"),
    *("bottleneck", "virtual tokens", "KV prefix", "merged weight"),
}


@pytest.mark.parametrize("kind", [kind.value for kind in PeftType])
def test_every_type_of_peft_is_served_or_refused_by_name(kind: str) -> None:
    assert (kind in FORMATS) != (kind in NEEDS)


@pytest.mark.parametrize("kind", NEEDS)
def test_what_is_not_served_is_refused_with_what_it_needs(kind: str) -> None:
    with pytest.raises(AdapterInvalid, match="peft_type") as refused:
        lower(checkpoint(peft_type=kind), BASE, AdapterLimits())
    assert NEEDS[kind] in str(refused.value)


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_every_field_of_a_merged_type_is_known(kind: PeftKind) -> None:
    theirs = {f.name for f in fields(PEFT_TYPE_TO_CONFIG_MAPPING[PeftType(kind.name)])}
    own = theirs - {f.name for f in fields(PeftConfig)}
    known = kind.fields | kind.harmless
    assert known <= own, "not PEFT's"
    assert own - known - TARGET_FIELDS - TRAINING_ONLY == {"modules_to_save"}
    assert not known & (COMMON_FIELDS | UNSUPPORTED.keys())


@pytest.mark.parametrize("name", FAMILIES)
def test_a_row_names_the_primitives_that_the_family_becomes(
    name: str, tiny_model: Callable[[str], Path], tmp_path: Path
) -> None:
    model = tiny_model("llama")
    directory = FAMILIES[name].save(model, tmp_path / name, 2)
    program = lowered(directory, load_base(str(model), quantization="fp32", native=False).spec)
    (row,) = (row for row in table.rows() if row.family == program.family)
    assert {p for module in program.modules for p in module.primitives} <= set(row.primitives)


def test_rows_name_primitives_as_reports_do() -> None:
    for row in table.rows():
        assert set(row.primitives) <= PRIMITIVES, row.title
        assert bool(row.family) == bool(row.primitives)


def test_the_page_has_the_table_of_the_code() -> None:
    text = PAGE.read_text()
    assert families_table.rewritten(text) == text, "run make formats"


def test_a_text_without_markers_is_refused() -> None:
    with pytest.raises(ValueError, match="formats:begin"):
        families_table.rewritten("no table here")
