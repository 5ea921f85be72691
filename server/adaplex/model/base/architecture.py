"""Which architectures can be served, and what their layers look like, found by running the model.

A probe run through the registered attention finds the shapes of keys and values, which linears and
norms see one row a token (the sites that adapters may touch), which blocks add their output to the
residual stream, and whether attention is called once a layer. Without the checks here an
architecture that does not fit would give wrong output without an error.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, PreTrainedConfig

from adaplex.adapters.program.base_spec import BaseModule
from adaplex.model.errors import UnsupportedModel
from adaplex.model.kv_cache import LayerShape
from adaplex.model.modules import attention
from adaplex.model.modules.hooks import oriented_weight
from adaplex.model.modules.residual_blocks import ResidualBlockProbe

FUSED = ("gate_up_proj", "down_proj")
"""Parameters that hold the weights of all experts of a layer."""
PROBE_TOKENS = 5
"""An unusual row count, so that no other dimension is mistaken for it."""


@dataclass
class Probe:
    """Findings of the probe run."""

    shapes: list[LayerShape] = field(default_factory=list)
    """By layer."""
    sites: list[BaseModule] = field(default_factory=list)


def check_supported(config: PreTrainedConfig) -> None:
    """Refuses what the attention interface cannot reach, before weights are read.

    Raises UnsupportedModel.
    """
    try:
        kind: Any = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    except KeyError:
        raise UnsupportedModel(f"{config.model_type}: not a causal language model") from None
    if not kind._supports_attention_backend:
        raise UnsupportedModel(f"{kind.__name__}: its attention has no interface to replace it by")
    parameters = inspect.signature(kind.forward).parameters
    for name in ("logits_to_keep", "position_ids"):
        if name not in parameters:
            raise UnsupportedModel(f"{kind.__name__}: its forward takes no {name}")
    if kind._is_stateful:
        raise UnsupportedModel(f"{kind.__name__}: it keeps a recurrent state besides its KV")


def probe(model: nn.Module) -> Probe:
    """Runs a few tokens and returns the findings; the model is left as it was.

    Raises UnsupportedModel.
    """
    attend = _RecordingAttention()
    attention.install(model, attend)
    head = output_layer(model)
    seen: list[BaseModule] = []
    blocks = ResidualBlockProbe(model)
    handles = list(blocks.handles)
    for name, module in model.named_modules():
        site = _describe(name, module, is_head=module is head)
        if site is not None:
            handles.append(module.register_forward_hook(_row_hook(site, seen)))
    try:
        _run(model)
    finally:
        for handle in handles:
            handle.remove()
    layers = int(model.config.num_hidden_layers)  # type: ignore[union-attr,arg-type]
    if attend.calls != layers or sorted(attend.shapes) != list(range(layers)):
        raise UnsupportedModel(
            f"{type(model).__name__}: attention was called {attend.calls} times for {layers} "
            "layers: some layers bypass it"
        )
    sites = [*_embedding(model), *seen, *_experts(model), *blocks.blocks()]
    return Probe(
        shapes=[attend.shapes[i] for i in range(layers)],
        sites=list({site.name: site for site in sites}.values()),
    )


class _RecordingAttention:
    """Causal attention without a cache, which records what each layer would store."""

    def __init__(self) -> None:
        self.calls = 0
        self.shapes: dict[int, LayerShape] = {}

    def __call__(
        self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, scale: float, **_: Any
    ) -> Tensor:
        """See Attend."""
        self.calls += 1
        layer = int(module.layer_idx)  # type: ignore[arg-type]
        self.shapes[layer] = LayerShape(key.shape[1], key.shape[3], value.shape[3])
        group = query.shape[1] // key.shape[1]
        mixed = F.scaled_dot_product_attention(
            query,
            key.repeat_interleave(group, 1),
            value.repeat_interleave(group, 1),
            is_causal=True,
            scale=scale,
        )
        return mixed.transpose(1, 2)


def _run(model: nn.Module) -> None:
    """Runs PROBE_TOKENS tokens, with logits for each."""
    device = next(model.parameters()).device
    tokens = torch.arange(1, PROBE_TOKENS + 1, device=device)[None]
    model(
        input_ids=tokens,
        position_ids=tokens - 1,
        use_cache=False,
        logits_to_keep=torch.arange(PROBE_TOKENS, device=device),
    )


def output_layer(model: nn.Module) -> nn.Module | None:
    """Returns the module that makes logits."""
    head: nn.Module | None = model.get_output_embeddings()  # type: ignore[operator]
    return head


def is_linear(module: nn.Module) -> bool:
    """True if the module is a plain linear; GPT-2 calls its transposed ones Conv1D."""
    return isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D"


def _describe(name: str, module: nn.Module, *, is_head: bool) -> BaseModule | None:
    """Returns the module as a site, None if adapters cannot touch its kind."""
    bias = getattr(module, "bias", None) is not None
    if is_linear(module):
        out_features, in_features = oriented_weight(module).shape
        transposed = type(module).__name__ == "Conv1D"
        return BaseModule(name, "linear", in_features, out_features, bias, is_head, transposed)
    weight = getattr(module, "weight", None)
    if isinstance(weight, nn.Parameter) and weight.dim() == 1:
        return BaseModule(name, "norm", weight.shape[0], weight.shape[0], bias)
    return None


def _embedding(model: nn.Module) -> Iterator[BaseModule]:
    """Yields the table that makes hidden states of tokens."""
    table: Any = model.get_input_embeddings()  # type: ignore[operator]
    name = next(name for name, module in model.named_modules() if module is table)
    yield BaseModule(name, "embedding", *table.weight.shape)


def _experts(model: nn.Module) -> Iterator[BaseModule]:
    """Yields the fused weights of experts."""
    for name, module in model.named_modules():
        for parameter in FUSED:
            weight = getattr(module, parameter, None)
            if isinstance(weight, nn.Parameter) and weight.dim() == 3:
                count, out_features, in_features = weight.shape
                transposed = bool(getattr(module, "is_transposed", False))
                if transposed:
                    out_features, in_features = in_features, out_features
                yield BaseModule(
                    f"{name}.{parameter}",
                    "experts",
                    in_features,
                    out_features,
                    transposed=transposed,
                    experts=count,
                )


def _row_hook(site: BaseModule, sites: list[BaseModule]) -> Any:
    """Returns a forward hook that appends the site if the module works on one row a token, or is a
    norm of the heads of one row a token.
    """

    def hook(_module: nn.Module, args: tuple[Any, ...], _output: Any) -> None:
        if not args:
            return
        shape = args[0].shape
        by_head = len(shape) == 4 and shape[1] == PROBE_TOKENS != shape[2]
        if shape[:-1].numel() == PROBE_TOKENS or (by_head and site.kind == "norm"):
            sites.append(site)

    return hook
