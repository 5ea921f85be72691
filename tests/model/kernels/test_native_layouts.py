"""The structs of structs.py have the layouts of types.h, and a difference is refused."""

from __future__ import annotations

import ctypes
from pathlib import Path
from typing import Any

import pytest

from adaplex.model.base.source import default_cache
from adaplex.model.kernels.native import layouts, library, structs
from adaplex.model.kernels.native.build import HERE, BuildFailed
from adaplex.model.kernels.native.structs import Address, Integer
from adaplex.model.weights.site_table import SITE_FIELDS


class ShortRun(ctypes.Structure):
    """A Run without its last field."""

    _fields_ = [("start", Integer), ("stop", Integer)]


class SwappedRun(ctypes.Structure):
    """A Run whose last two fields are swapped."""

    _fields_ = [("start", Integer), ("sites", Address), ("stop", Integer)]


class NarrowRun(ctypes.Structure):
    """A Run with a narrower field, and the offsets that it had."""

    _fields_ = [("start", ctypes.c_int32), ("stop", Integer), ("sites", Address)]


class LongRun(ctypes.Structure):
    """A Run with one more field."""

    _fields_ = [("start", Integer), ("stop", Integer), ("sites", Address), ("more", Integer)]


@pytest.mark.parametrize(
    ("run", "field"),
    [
        (SwappedRun, "Run.sites has 8 bytes at offset 16 in types.h but 8 bytes at offset 8"),
        (NarrowRun, "Run.start has 8 bytes at offset 0 in types.h but 4 bytes at offset 0"),
        (LongRun, "Run.more has no place in types.h but 8 bytes at offset 24"),
        (ShortRun, "Run has 24 bytes at offset 0 in types.h but 16 bytes at offset 0"),
    ],
)
def test_a_struct_that_differs_is_refused_by_name(
    run: type[ctypes.Structure], field: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = type("Run", (run,), {})
    rest = tuple(each for each in structs.MIRRORED if each is not structs.Run)
    monkeypatch.setattr(structs, "MIRRORED", (run, *rest))
    with pytest.raises(BuildFailed, match=field):
        library.load_library(default_cache())


@pytest.mark.parametrize(
    ("fields", "field"),
    [
        (("b", "a", *SITE_FIELDS[2:]), "Site.b has 8 bytes at offset 8 in types.h"),
        (SITE_FIELDS[:-1], "Site has 120 bytes"),
        ((*SITE_FIELDS, "more"), "Site.more has no place in types.h"),
    ],
)
def test_fields_of_sites_that_differ_are_refused_by_name(
    fields: tuple[str, ...], field: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(layouts, "SITE_FIELDS", fields)
    with pytest.raises(BuildFailed, match=field):
        library.load_library(default_cache())


def test_a_number_of_linears_that_differs_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    fields: list[Any] = [("qkv", structs.Linear * 2), *structs.Layer._fields_[1:]]
    layer = type("Layer", (ctypes.Structure,), {"_fields_": fields})
    rest = tuple(each for each in structs.MIRRORED if each is not structs.Layer)
    monkeypatch.setattr(structs, "MIRRORED", (layer, *rest))
    with pytest.raises(BuildFailed, match=r"Layer\.qkv has 216 bytes"):
        library.load_library(default_cache())


def test_every_field_of_every_struct_is_compared() -> None:
    in_c = layouts.library_layouts(library.load_library(default_cache()))
    declared = [
        each
        for each in vars(structs).values()
        if isinstance(each, type) and issubclass(each, ctypes.Structure)
    ]
    assert set(declared) == set(structs.MIRRORED)
    names = {each.__name__: [name for name, *_ in each._fields_] for each in declared}
    names["Site"] = list(SITE_FIELDS)
    fields = {f"{struct}.{name}" for struct, each in names.items() for name in each}
    assert set(in_c) == fields | set(names)
    for struct, each in names.items():  # fields of C that the table lacks would be missing here
        assert sum(in_c[f"{struct}.{name}"][0] for name in each) == in_c[struct][0]


def test_every_struct_of_the_header_is_compared() -> None:
    header = Path(HERE / "types.h").read_text()
    in_c = layouts.library_layouts(library.load_library(default_cache()))
    assert header.count("typedef struct") == sum("." not in name for name in in_c)
