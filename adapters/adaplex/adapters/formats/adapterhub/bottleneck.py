"""Bottleneck adapters of AdapterHub (`BnConfig`): Houlsby's, Pfeiffer's and parallel ones.

A block's output y joins the residual stream r. In llama-shaped models no norm follows, so the
library's `original_ln_*` decide only where r is added:
  parallel                                          r + y + f(r)
  original_ln_after alone (Houlsby)                 r + y + f(y)
  both, with residual_before_ln (Pfeiffer)          r + y + f(r + y)
  original_ln_before alone, without the latter      r + y + f(r + y)
Other combinations lose r or add it twice. Source: `adapters.methods.modeling`.
"""

from __future__ import annotations

from typing import Any

import torch

from adaplex.adapters.formats.adapterhub.method_config import LoweredMethod, MethodConfig
from adaplex.adapters.formats.lowering_context import MAX_NUMBER, is_number
from adaplex.adapters.program.primitives import Activation, Bottleneck, Reads
from adaplex.adapters.program.program import ModuleProgram

USED = (
    *("mh_adapter", "output_adapter", "reduction_factor", "leave_out", "non_linearity", "scaling"),
    *("is_parallel", "original_ln_before", "original_ln_after", "residual_before_ln"),
)
HARMLESS = (
    *("architecture", "init_weights", "init_weights_seed", "dropout", "stochastic_depth"),
    "adapter_residual_before_ln",  # where ln_after comes, and there is none
    "cross_adapter",  # decoders have no cross-attention
    "inv_adapter_reduction_factor",
    *("phm_dim", "factorized_phm_W", "shared_W_phm", "shared_phm_rule", "factorized_phm_rule"),
    *("phm_c_init", "phm_init_range", "learn_phm", "hypercomplex_nonlinearity", "phm_rank"),
    "phm_bias",
)
UNSUPPORTED = {
    "inv_adapter": "invertible adapters need a primitive that changes the embedding's output",
    "ln_after": "a layer norm behind the bottleneck is not a sum of its columns",
    "ln_before": "a layer norm before the bottleneck needs statistics of what it reads",
    "phm_layer": "Compacter's hypercomplex layers are not expanded here",
    "use_gating": "gates average over the whole prompt, which a stream does not have",
}
BLOCKS = {
    "mh_adapter": ("self_attn", "attention_adapters"),
    "output_adapter": ("mlp", "output_adapters"),
}
"""Field -> which block, and where the library puts the tensors."""
ACTIVATIONS = {
    "gelu": Activation.GELU,
    "gelu_accurate": Activation.GELU_TANH,
    "gelu_fast": Activation.GELU_TANH,
    "gelu_new": Activation.GELU_TANH,
    "gelu_python": Activation.GELU,
    "gelu_pytorch_tanh": Activation.GELU_TANH,
    "leaky_relu": Activation.LEAKY_RELU,
    "leakyrelu": Activation.LEAKY_RELU,
    "linear": Activation.IDENTITY,
    "relu": Activation.RELU,
    "sigmoid": Activation.SIGMOID,
    "silu": Activation.SILU,
    "swish": Activation.SILU,
    "tanh": Activation.TANH,
}
LEARNED = ("learned", "channel")
"""Scalings that are tensors: one number, or one for each feature."""
LEAST_FACTOR = 1e-3


def lower_bottleneck(part: MethodConfig) -> LoweredMethod:
    """The bottlenecks of a `BnConfig`; refusals go to the part's context."""
    context = part.context
    context.check_fields("AdapterHub's bottlenecks", USED, HARMLESS, UNSUPPORTED)
    part.check_flags(*BLOCKS, "is_parallel", "original_ln_before", "original_ln_after")
    reads, activation, scaling = _reads(part), _activation(part), _scaling(part)
    _check_factors(part)
    layers = part.used_layers()
    if reads is None or activation is None or context.refusals:
        return LoweredMethod("bottleneck", (), {})
    made = [
        _lower_block(part, layer, *BLOCKS[field], reads, activation)
        for field in BLOCKS
        for layer in (layers if part.field(field, False) else ())
    ]
    modules = tuple(module for module in made if module is not None)
    semantics = {"reads": reads, "activation": activation, "scaling": scaling}
    return LoweredMethod("bottleneck", modules, semantics)


def _lower_block(
    part: MethodConfig, layer: int, block: str, place: str, reads: Reads, activation: Activation
) -> ModuleProgram | None:
    """One bottleneck; None, with refusals, when its tensors do not fit."""
    module = part.module(f"model.layers.{layer}.{block}")
    if module is None:
        return None
    hidden, scaling = module.in_features, _scaling(part)
    width = _width(part, layer, hidden)
    shapes: dict[str, tuple[int, ...]] = {
        "adapter_down.0.weight": (width, hidden),
        "adapter_down.0.bias": (width,),
        "adapter_up.weight": (hidden, width),
        "adapter_up.bias": (hidden,),
    }
    if scaling in LEARNED:
        shapes["scaling"] = (1 if scaling == "learned" else hidden,)
    found = part.take(f"layers.{layer}.{place}", shapes)
    if found is None:
        return None
    scale = found["scaling"].float() if scaling in LEARNED else torch.tensor(float(scaling))
    bottleneck = Bottleneck(
        found["adapter_down.0.weight"],
        found["adapter_up.weight"].float() * scale.reshape(-1, 1),
        found["adapter_down.0.bias"],
        found["adapter_up.bias"].float() * scale,
        activation,
        reads,
    )
    return ModuleProgram(module.name, bottleneck=bottleneck)


def _reads(part: MethodConfig) -> Reads | None:
    """What the bottlenecks read; None, with a refusal, for what is no sum."""
    before, after = part.field("original_ln_before", False), part.field("original_ln_after", True)
    residual = part.field("residual_before_ln", True)
    if part.field("is_parallel", False):
        if after:
            return Reads.RESIDUAL
    elif residual in (True, False):
        if after and not before:
            return Reads.OUTPUT
        if before and after == residual:
            return Reads.SUM
    part.context.refuse(
        "original_ln_before",
        f"{before!r:.20} with original_ln_after {after!r:.20} and residual_before_ln "
        f"{residual!r:.20} loses what the block adds to, or adds it twice",
    )
    return None


def _activation(part: MethodConfig) -> Activation | None:
    name = part.context.config.get("non_linearity")
    found = ACTIVATIONS.get(name.lower()) if isinstance(name, str) else None
    if found is None:
        served = ", ".join(sorted(ACTIVATIONS))
        part.context.refuse("non_linearity", f"{name!r:.40} is not served; served are {served}")
    return found


def _scaling(part: MethodConfig) -> Any:
    """A number, or one of LEARNED; anything else is refused."""
    scaling = part.field("scaling", 1.0)
    fits = scaling in LEARNED or (type(scaling) in (int, float) and abs(scaling) < MAX_NUMBER)
    part.context.check_kind("scaling", fits, f"a number, or one of {', '.join(LEARNED)}")
    return scaling


def _check_factors(part: MethodConfig) -> None:
    """Refuses reduction factors that are no numbers, or leave layers out."""
    found = part.context.config.get("reduction_factor")
    by_layer: dict[str, Any] = found if isinstance(found, dict) else {"default": found}
    fits = all(is_number(value) and value >= LEAST_FACTOR for value in by_layer.values())
    kind = f"a number of at least {LEAST_FACTOR}, or such numbers by layer"
    if part.context.check_kind("reduction_factor", fits, kind) and "default" not in by_layer:
        for layer in part.used_layers():
            if str(layer) not in by_layer:
                part.context.refuse("reduction_factor", f"says nothing of layer {layer}")


def _width(part: MethodConfig, layer: int, hidden: int) -> int:
    """Of the bottleneck of a layer."""
    found = part.context.config["reduction_factor"]
    by_layer: dict[str, Any] = found if isinstance(found, dict) else {"default": found}
    factor = by_layer[str(layer)] if str(layer) in by_layer else by_layer["default"]
    return max(int(hidden // factor), 1)
