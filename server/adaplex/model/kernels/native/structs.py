"""The structs of types.h for ctypes; `layouts` compares them with those of a loaded library."""

from __future__ import annotations

import ctypes
from typing import Any

Address = ctypes.c_void_p
Integer = ctypes.c_int64


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
        ("int8_inputs", Integer),
    ]


class Int8Head(ctypes.Structure):
    """A copy of the output layer in 8 bits; without one, `panels` is None."""

    _fields_ = [
        ("panels", Address),
        ("scales", Address),
        ("errors", Address),
        ("longest", ctypes.c_double),
    ]


class Run(ctypes.Structure):
    """Rows [start, stop) of one adapter; `sites` is the address of its table, None for the base."""

    _fields_ = [
        ("start", Integer),
        ("stop", Integer),
        ("sites", Address),
    ]


class Linear(ctypes.Structure):
    """A linear of the base, and the number of its module."""

    _fields_ = [
        ("weight", Weight),
        ("module", Integer),
    ]


class Norm(ctypes.Structure):
    """A norm of the base; without a weight, a layer lacks it."""

    _fields_ = [
        ("weight", Address),
        ("bias", Address),
        ("module", Integer),
        ("centered", Integer),
        ("epsilon", ctypes.c_double),
        ("offset", ctypes.c_double),
    ]


class Layer(ctypes.Structure):
    """One decoder layer."""

    _fields_ = [
        ("qkv", Linear * 3),
        ("gate_up", Linear * 2),
        ("out", Linear),
        ("down", Linear),
        ("qkv_count", Integer),
        ("gate_up_count", Integer),
        ("attention_norm", Norm),
        ("q_norm", Norm),
        ("k_norm", Norm),
        ("attention_out_norm", Norm),
        ("mlp_norm", Norm),
        ("mlp_out_norm", Norm),
        ("attention_module", Integer),
        ("mlp_module", Integer),
        ("keys", Address),
        ("values", Address),
        ("cosines", Address),
        ("sines", Address),
        ("window", Integer),
        ("scale", ctypes.c_double),
        ("softcap", ctypes.c_double),
    ]


class Model(ctypes.Structure):
    """A decoder."""

    _fields_ = [
        ("embedding", Address),
        ("position_embedding", Address),
        ("layer", ctypes.POINTER(Layer)),
        ("final_norm", Norm),
        ("head", Weight),
        ("int8_head", Int8Head),
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
        ("rotary_dim", Integer),
        ("activation", Integer),
        ("gated", Integer),
        ("embedding_module", Integer),
        ("head_module", Integer),
        ("embedding_scale", ctypes.c_double),
        ("logit_softcap", ctypes.c_double),
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
        ("only_likeliest", Integer),
    ]


MIRRORED: tuple[type[ctypes.Structure], ...] = (
    Weight,
    Int8Head,
    Run,
    Linear,
    Norm,
    Layer,
    Model,
    Step,
)
"""The structs that types.h declares under the same names."""
