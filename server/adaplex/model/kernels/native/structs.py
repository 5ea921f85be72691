"""The structs of types.h, for ctypes."""

from __future__ import annotations

import ctypes
from typing import Any

Address = ctypes.c_void_p
Integer = ctypes.c_int64


def address_of(struct: ctypes.Array[Any] | ctypes.Structure) -> int:
    """Where a struct, or an array of them, lies."""
    return ctypes.addressof(struct)


class Weight(ctypes.Structure):
    """A frozen weight in panels."""

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
    """Rows [start, stop) of one adapter."""

    _fields_ = [("start", Integer), ("stop", Integer), ("sites", Address)]


class Layer(ctypes.Structure):
    """One decoder layer."""

    _fields_ = [
        *((name, Weight) for name in ("q", "k", "v", "o", "gate", "up", "down")),
        ("attention_norm", Address),
        ("mlp_norm", Address),
        ("q_norm", Address),
        ("k_norm", Address),
        ("keys", Address),
        ("values", Address),
        ("window", Integer),
        ("modules", Integer * 13),
    ]


class Model(ctypes.Structure):
    """A whole decoder."""

    _fields_ = [
        ("embedding", Address),
        ("final_norm", Address),
        ("cosines", Address),
        ("sines", Address),
        ("layer", ctypes.POINTER(Layer)),
        ("head", Weight),
        *(
            (name, Integer)
            for name in (
                *("layers", "hidden", "heads", "kv_heads", "head_dim", "middle", "vocabulary"),
                *("positions", "blocks", "modules"),
                *("embedding_module", "final_norm_module", "head_module"),
            )
        ),
        ("epsilon", ctypes.c_double),
        ("scale", ctypes.c_double),
    ]


class Step(ctypes.Structure):
    """What one step computes."""

    _fields_ = [
        *(
            (name, Address)
            for name in (
                *("tokens", "position", "first", "table", "wanted"),
                *("run", "head_run", "logits", "likeliest"),
            )
        ),
        *(
            (name, Integer)
            for name in ("rows", "sequences", "width", "wanted_rows", "runs", "head_runs")
        ),
    ]
