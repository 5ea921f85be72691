"""Comparison of structs.py with types.h: the size and offset of every field, in a loaded library.

The library exports `struct_layouts` (layouts.h), an array of FieldLayout that ends with a null
name.
"""

from __future__ import annotations

import ctypes

from adaplex.model.kernels.native import structs
from adaplex.model.weights.site_table import SITE_FIELDS

Layouts = dict[str, tuple[int, int]]
"""`Struct.field` -> (size, offset) in bytes; after its fields, `Struct` -> (size, 0)."""


class FieldLayout(ctypes.Structure):
    """One entry of `struct_layouts`."""

    _fields_ = [
        ("name", ctypes.c_char_p),
        ("size", structs.Integer),
        ("offset", structs.Integer),
    ]


def first_mismatch(library: ctypes.CDLL) -> str | None:
    """Returns the first difference between C and Python as text, None if there is none."""
    in_c, in_python = library_layouts(library), python_layouts()
    for name in (*in_python, *in_c):
        if in_c.get(name) != in_python.get(name):
            sides = _text(in_c.get(name)), _text(in_python.get(name))
            return f"{name} has {sides[0]} in types.h but {sides[1]} in structs.py"
    return None


def library_layouts(library: ctypes.CDLL) -> Layouts:
    """Returns the layouts that the library was compiled with."""
    at = ctypes.addressof(FieldLayout.in_dll(library, "struct_layouts"))
    found: Layouts = {}
    while (entry := FieldLayout.from_address(at)).name is not None:
        found[entry.name.decode()] = (entry.size, entry.offset)
        at += ctypes.sizeof(FieldLayout)
    return found


def python_layouts() -> Layouts:
    """Returns the layouts of structs.py; a Site has eight bytes for each of SITE_FIELDS."""
    size = ctypes.sizeof(structs.Integer)
    found: Layouts = {f"Site.{name}": (size, size * i) for i, name in enumerate(SITE_FIELDS)}
    found["Site"] = (size * len(SITE_FIELDS), 0)
    for struct in structs.MIRRORED:
        for name, *_ in struct._fields_:
            field = getattr(struct, name)
            found[f"{struct.__name__}.{name}"] = (field.size, field.offset)
        found[struct.__name__] = (ctypes.sizeof(struct), 0)
    return found


def _text(layout: tuple[int, int] | None) -> str:
    return "no place" if layout is None else f"{layout[0]} bytes at offset {layout[1]}"
