"""ResidualBlockProbe: finds attention and MLP in each layer, and whether bottlenecks fit there.

A bottleneck changes what a block adds to the residual stream, so the input of the norm before the
block must be the stream, and the block's output must be added to it unchanged. Running the model
shows whether both hold.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from adaplex.adapters.program.base_spec import BaseModule

PRE_NORMED = {
    "self_attn": ("input_layernorm", "attention"),
    "mlp": ("post_attention_layernorm", "mlp"),
}
"""Blocks of a llama-shaped layer: the norm before each, and which part of the layer it is."""
TOLERANCE = 1e-2
"""Largest difference that counts as equal, as a share of the norm: bf16 rounds by less."""


class ResidualBlockProbe:
    """Records what goes through the blocks of a model while it runs; remove the handles then."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._seen: dict[str, Tensor] = {}
        """Inputs of norms, outputs of blocks and layers, by the module's name."""
        self.handles: list[Any] = []
        self._layers: dict[str, int] = {}
        self._attention: dict[str, int] = {}
        for name, module in model.named_modules():
            children = {child for child, _ in module.named_children()}
            if children == {*PRE_NORMED, *(norm for norm, _ in PRE_NORMED.values())}:
                self._watch_layer(name, module)
            elif hasattr(module, "layer_idx") and "attn" in name.rpartition(".")[2]:
                self._attention[name] = int(module.layer_idx)

    def blocks(self) -> Iterator[BaseModule]:
        """Yields every block that was found."""
        for layer, index in self._layers.items():
            joins = self._joins(layer)
            for block, (_, part) in PRE_NORMED.items():
                yield self._block(f"{layer}.{block}", index, part, joins=joins)
        for name, index in self._attention.items():
            if name.rpartition(".")[0] not in self._layers:
                yield self._block(name, index, "attention", joins=False)

    def _watch_layer(self, name: str, layer: nn.Module) -> None:
        self._layers[name] = int(re.findall(r"\d+", name)[-1])
        self._record(name, layer, output=True)
        for block, (norm, _) in PRE_NORMED.items():
            self._record(f"{name}.{norm}", layer.get_submodule(norm), output=False)
            self._record(f"{name}.{block}", layer.get_submodule(block), output=True)

    def _block(self, name: str, layer: int, part: Any, *, joins: bool) -> BaseModule:
        hidden = int(self._model.get_input_embeddings().weight.shape[1])  # type: ignore[operator]
        return BaseModule(name, "block", hidden, hidden, layer=layer, part=part, joins=joins)

    def _joins(self, layer: str) -> bool:
        """True if the output of the layer is its input plus the outputs of both blocks."""
        found = [
            self._seen.get(f"{layer}{part}")
            for part in (".input_layernorm", ".self_attn", ".post_attention_layernorm", ".mlp", "")
        ]
        if any(tensor is None for tensor in found):
            return False
        start, attended, middle, mixed, end = (t.float() for t in found if t is not None)
        return _close(start + attended, middle) and _close(middle + mixed, end)

    def _record(self, name: str, module: nn.Module, *, output: bool) -> None:
        """Records the output or the first input of a module under its name."""

        def hook(_module: nn.Module, args: tuple[Any, ...], given: Any) -> None:
            tensor = given if output else args[0]
            self._seen[name] = tensor[0] if isinstance(tensor, tuple) else tensor

        self.handles.append(module.register_forward_hook(hook))


def _close(a: Tensor, b: Tensor) -> bool:
    apart = torch.linalg.vector_norm(a - b)
    return bool(apart <= TOLERANCE * torch.linalg.vector_norm(b))
