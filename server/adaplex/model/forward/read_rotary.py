"""RotaryReader: reads the tables of rotations of a base for the C decoder."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch

from adaplex.model.forward.decoder_shape import OtherShape, Rotary

ROPE_SETTINGS = frozenset(
    {
        "attention_factor",
        "beta_fast",
        "beta_slow",
        "factor",
        "high_freq_factor",
        "low_freq_factor",
        "mscale",
        "mscale_all_dim",
        "original_max_position_embeddings",
        "partial_rotary_factor",
        "rope_theta",
        "rope_type",
        "truncate",
        "type",
    }
)
"""Known rope parameters. `llama_4_scaling_beta` of ministral3 is not among them, on purpose: it
scales queries of far positions."""
BY_LENGTH = ("dynamic", "longrope")
"""Kinds of rotary embeddings whose frequencies depend on the length of the text."""


class RotaryReader:
    """Reads the tables of each type of layer once."""

    def __init__(self, module: Any, parameters: Mapping[str, Any], *, positions: int) -> None:
        """`module` is the rotary embedding of the base, None if it has none, `parameters` are those
        of its configuration; tables cover `positions`. Raises OtherShape for unknown parameters.
        """
        self._module, self._positions = module, positions
        self._read: dict[str | None, Rotary] = {}
        nested = [each for each in parameters.values() if isinstance(each, Mapping)]
        for each in nested or [parameters]:
            if unknown := set(each) - ROPE_SETTINGS:
                raise OtherShape(f"rope with {', '.join(sorted(unknown))}")
            if each.get("rope_type") in BY_LENGTH:
                raise OtherShape(f"rope of type {each['rope_type']}")
        self._by_type = module is not None and (
            "layer_type" in inspect.signature(module.forward).parameters
        )

    def read(self, layer_type: str | None) -> Rotary | None:
        """Returns the rotations in layers of this type, None without a rotary embedding. Raises
        OtherShape.
        """
        if self._module is None:
            return None
        key = layer_type if self._by_type else None
        if key not in self._read:
            self._read[key] = self._tables(*(() if key is None else (key,)))
        return self._read[key]

    def _tables(self, *layer_type: str) -> Rotary:
        where = torch.arange(self._positions)[None]
        cosines, sines = self._module(torch.zeros(1, dtype=torch.float32), where, *layer_type)
        half = cosines.shape[-1] // 2
        if not torch.equal(cosines[..., :half], cosines[..., half:]):
            raise OtherShape("rotations of other pairs of dimensions")
        halves = (each[0, :, :half].float().contiguous() for each in (cosines, sines))
        return Rotary(*halves)
