"""ResidualBlockProbe: finds attention and MLP in each layer, and whether bottlenecks fit there.

A bottleneck changes what a block adds to the residual stream, so the stream has to be what goes
into the norm before the block, and the block's output must be added to it as it is. Whether that is
so is seen by running the model.
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
"""Blocks of a llama-shaped layer: the norm before each, and which part it is."""
TOLERANCE = 1e-2
"""Share of the norm by which rounding in bf16 stays apart."""


class ResidualBlockProbe:
    """Watches a model run; close the handles after it."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._seen: dict[str, Tensor] = {}
        """What went into norms and layers, and what came out of blocks and layers."""
        self.handles: list[Any] = []
        self._layers: dict[str, int] = {}
        self._attention: dict[str, int] = {}
        for name, module in model.named_modules():
            children = {child for child, _ in module.named_children()}
            if children == {*PRE_NORMED, *(norm for norm, _ in PRE_NORMED.values())}:
                self._layers[name] = int(re.findall(r"\d+", name)[-1])
                self.handles.append(module.register_forward_hook(self._keep(name, output=True)))
                for block, (norm, _) in PRE_NORMED.items():
                    for child, output in ((norm, False), (block, True)):
                        hook = self._keep(f"{name}.{child}", output=output)
                        handle = module.get_submodule(child).register_forward_hook(hook)
                        self.handles.append(handle)
            elif hasattr(module, "layer_idx") and "attn" in name.rpartition(".")[2]:
                self._attention[name] = int(module.layer_idx)

    def blocks(self) -> Iterator[BaseModule]:
        """Every block that was found."""
        for layer, index in self._layers.items():
            joins = self._joins(layer)
            for block, (_, part) in PRE_NORMED.items():
                yield self._block(f"{layer}.{block}", index, part, joins=joins)
        for name, index in self._attention.items():
            if name.rpartition(".")[0] not in self._layers:
                yield self._block(name, index, "attention", joins=False)

    def _block(self, name: str, layer: int, part: Any, *, joins: bool) -> BaseModule:
        hidden = int(self._model.get_input_embeddings().weight.shape[1])  # type: ignore[operator]
        return BaseModule(name, "block", hidden, hidden, layer=layer, part=part, joins=joins)

    def _joins(self, layer: str) -> bool:
        """Whether what leaves the layer is what came in and what both blocks gave."""
        found = [
            self._seen.get(f"{layer}{part}")
            for part in (".input_layernorm", ".self_attn", ".post_attention_layernorm", ".mlp", "")
        ]
        if any(tensor is None for tensor in found):
            return False
        start, attended, middle, mixed, end = (t.float() for t in found if t is not None)
        return _close(start + attended, middle) and _close(middle + mixed, end)

    def _keep(self, name: str, *, output: bool) -> Any:
        def hook(_module: nn.Module, args: tuple[Any, ...], given: Any) -> None:
            tensor = given if output else args[0]
            self._seen[name] = tensor[0] if isinstance(tensor, tuple) else tensor

        return hook


def _close(a: Tensor, b: Tensor) -> bool:
    apart = torch.linalg.vector_norm(a - b)
    return bool(apart <= TOLERANCE * torch.linalg.vector_norm(b))
