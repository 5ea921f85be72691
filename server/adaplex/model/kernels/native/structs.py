"""The structs of types.h for ctypes; `layouts` compares them with those of a loaded library."""

from __future__ import annotations

import ctypes
from typing import Any

Address = ctypes.c_void_p
Integer = ctypes.c_int64

LAYER_MODULES = 13
"""Modules of a layer, numbered as in types.h: 7 linears, 2 norms, 2 blocks, 2 head norms."""
LayerModules = Integer * LAYER_MODULES
"""Type of `Layer.modules`."""


def address_of(struct: ctypes.Array[Any] | ctypes.Structure) -> int:
    """Returns the address of a struct or of an array of structs."""
    return ctypes.addressof(struct)


class Weight(ctypes.Structure):
    """A frozen weight [out, in] in panels."""

    _fields_ = [
        ("panels", Address),
        ("scales", Address),
        ("bias", Address),
        ("in_features", Integer),
        ("out_features", Integer),
        ("group", Integer),
        ("zeros", Address),
    ]


class Run(ctypes.Structure):
    """Rows [start, stop) of one adapter; `sites` is the address of its table, None for the base."""

    _fields_ = [
        ("start", Integer),
        ("stop", Integer),
        ("sites", Address),
    ]


class Layer(ctypes.Structure):
    """One decoder layer."""

    _fields_ = [
        ("q", Weight),
        ("k", Weight),
        ("v", Weight),
        ("o", Weight),
        ("gate", Weight),
        ("up", Weight),
        ("down", Weight),
        ("attention_norm", Address),
        ("mlp_norm", Address),
        ("q_norm", Address),
        ("k_norm", Address),
        ("keys", Address),
        ("values", Address),
        ("window", Integer),
        ("modules", LayerModules),
    ]


class Model(ctypes.Structure):
    """A decoder."""

    _fields_ = [
        ("embedding", Address),
        ("final_norm", Address),
        ("cosines", Address),
        ("sines", Address),
        ("layer", ctypes.POINTER(Layer)),
        ("head", Weight),
        ("layers", Integer),
        ("hidden", Integer),
        ("heads", Integer),
        ("kv_heads", Integer),
        ("head_dim", Integer),
        ("middle", Integer),
        ("vocabulary", Integer),
        ("positions", Integer),
        ("blocks", Integer),
        ("modules", Integer),
        ("embedding_module", Integer),
        ("final_norm_module", Integer),
        ("head_module", Integer),
        ("epsilon", ctypes.c_double),
        ("scale", ctypes.c_double),
    ]


class Step(ctypes.Structure):
    """The rows of one step, and the addresses of its results."""

    _fields_ = [
        ("tokens", Address),
        ("position", Address),
        ("first", Address),
        ("table", Address),
        ("wanted", Address),
        ("run", Address),
        ("head_run", Address),
        ("logits", Address),
        ("likeliest", Address),
        ("rows", Integer),
        ("sequences", Integer),
        ("width", Integer),
        ("wanted_rows", Integer),
        ("runs", Integer),
        ("head_runs", Integer),
    ]


MIRRORED: tuple[type[ctypes.Structure], ...] = (Weight, Run, Layer, Model, Step)
"""The structs that types.h declares under the same names."""
