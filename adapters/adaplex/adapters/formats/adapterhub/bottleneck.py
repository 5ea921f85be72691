"""Bottleneck adapters of AdapterHub (`BnConfig`): Houlsby's, Pfeiffer's and parallel ones.

A block's output y is added to the residual stream r. In llama-shaped models no norm follows, so
that the library's fields `original_ln_*` determine only where r is added:
  is_parallel                                       r + y + f(r)
  original_ln_after alone (Houlsby)                 r + y + f(y)
  both, with residual_before_ln (Pfeiffer)          r + y + f(r + y)
  original_ln_before alone, no residual_before_ln   r + y + f(r + y)
Other values omit r or add it twice. Source: `adapters.methods.modeling`.
"""

from __future__ import annotations

from typing import Any

import torch

from adaplex.adapters.formats.adapterhub.method_config import LoweredMethod, MethodConfig
from adaplex.adapters.formats.lowering_context import MAX_NUMBER, is_number
from adaplex.adapters.program.primitives import Activation, Bottleneck, Reads
from adaplex.adapters.program.program import ModuleProgram

USED = (
    "mh_adapter",
    "output_adapter",
    "reduction_factor",
    "leave_out",
    "non_linearity",
    "scaling",
    "is_parallel",
    "original_ln_before",
    "original_ln_after",
    "residual_before_ln",
)
"""Fields that change the answer."""
HARMLESS = (
    "architecture",
    "init_weights",
    "init_weights_seed",
    "dropout",
    "stochastic_depth",
    "adapter_residual_before_ln",  # affects only ln_after, which is refused
    "cross_adapter",  # decoders have no cross-attention
    "inv_adapter_reduction_factor",
    "phm_dim",
    "factorized_phm_W",
    "shared_W_phm",
    "shared_phm_rule",
    "factorized_phm_rule",
    "phm_c_init",
    "phm_init_range",
    "learn_phm",
    "hypercomplex_nonlinearity",
    "phm_rank",
    "phm_bias",
)
"""Fields that do not change the answer, or only together with an unsupported field."""
UNSUPPORTED = {
    "inv_adapter": "invertible adapters need a primitive that changes the embedding's output",
    "ln_after": "a layer norm after the bottleneck is not a sum of its columns",
    "ln_before": "a layer norm before the bottleneck needs statistics of its input",
    "phm_layer": "Compacter's hypercomplex layers cannot be expanded here",
    "use_gating": "gates average over the whole prompt, which chunks and decode steps do not have",
}
"""Fields that change the answer but are not served, and why."""
BLOCKS = {
    "mh_adapter": ("self_attn", "attention_adapters"),
    "output_adapter": ("mlp", "output_adapters"),
}
"""Field -> block of the layer, and the library's place of the block's tensors."""
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
"""Activation by the value of `non_linearity`, in lower case."""
LEARNED = ("learned", "channel")
"""Values of `scaling` for which the scale is a tensor: one element, or one for each feature."""
MIN_FACTOR = 1e-3
"""Smallest `reduction_factor`, so that the width stays finite."""


def lower_bottleneck(method: MethodConfig) -> LoweredMethod:
    """Lowers the bottlenecks of a `BnConfig`; refusals are added to the method's context."""
    context = method.context
    context.check_fields("AdapterHub's bottlenecks", USED, HARMLESS, UNSUPPORTED)
    method.check_flags(*BLOCKS, "is_parallel", "original_ln_before", "original_ln_after")
    reads, activation, scaling = _reads(method), _activation(method), _scaling(method)
    _check_factors(method)
    layers = method.used_layers()
    if reads is None or activation is None or context.refusals:
        return LoweredMethod("bottleneck", (), {})
    made = [
        _lower_block(method, layer, *BLOCKS[field], reads, activation)
        for field in BLOCKS
        for layer in (layers if method.field(field, False) else ())
    ]
    modules = tuple(module for module in made if module is not None)
    semantics = {"reads": reads, "activation": activation, "scaling": scaling}
    return LoweredMethod("bottleneck", modules, semantics)


def _lower_block(
    method: MethodConfig, layer: int, block: str, place: str, reads: Reads, activation: Activation
) -> ModuleProgram | None:
    """Returns one bottleneck; None, with refusals, if its tensors do not fit."""
    module = method.module(f"model.layers.{layer}.{block}")
    if module is None:
        return None
    hidden, scaling = module.in_features, _scaling(method)
    width = _width(method, layer, hidden)
    shapes: dict[str, tuple[int, ...]] = {
        "adapter_down.0.weight": (width, hidden),
        "adapter_down.0.bias": (width,),
        "adapter_up.weight": (hidden, width),
        "adapter_up.bias": (hidden,),
    }
    if scaling in LEARNED:
        shapes["scaling"] = (1 if scaling == "learned" else hidden,)
    found = method.pop_tensors(f"layers.{layer}.{place}", shapes)
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


def _reads(method: MethodConfig) -> Reads | None:
    """Returns the input of the bottlenecks; None, with a refusal, for unsupported values."""
    before, after = (
        method.field("original_ln_before", False),
        method.field("original_ln_after", True),
    )
    residual = method.field("residual_before_ln", True)
    if method.field("is_parallel", False):
        if after:
            return Reads.RESIDUAL
    elif residual in (True, False):
        if after and not before:
            return Reads.OUTPUT
        if before and after == residual:
            return Reads.SUM
    method.context.refuse(
        "original_ln_before",
        f"{before!r:.20} with original_ln_after {after!r:.20} and residual_before_ln "
        f"{residual!r:.20} omits the residual stream, or adds it twice",
    )
    return None


def _activation(method: MethodConfig) -> Activation | None:
    name = method.context.config.get("non_linearity")
    found = ACTIVATIONS.get(name.lower()) if isinstance(name, str) else None
    if found is None:
        served = ", ".join(sorted(ACTIVATIONS))
        method.context.refuse("non_linearity", f"{name!r:.40} is not served; served are {served}")
    return found


def _scaling(method: MethodConfig) -> Any:
    """Returns `scaling`: a number, or one of LEARNED; refuses other values."""
    scaling = method.field("scaling", 1.0)
    fits = scaling in LEARNED or (type(scaling) in (int, float) and abs(scaling) < MAX_NUMBER)
    method.context.check_kind("scaling", fits, f"a number, or one of {', '.join(LEARNED)}")
    return scaling


def _check_factors(method: MethodConfig) -> None:
    """Refuses reduction factors that are not numbers, or are missing for a layer."""
    found = method.context.config.get("reduction_factor")
    by_layer: dict[str, Any] = found if isinstance(found, dict) else {"default": found}
    fits = all(is_number(value) and value >= MIN_FACTOR for value in by_layer.values())
    kind = f"a number of at least {MIN_FACTOR}, or an object of such numbers by layer"
    if method.context.check_kind("reduction_factor", fits, kind) and "default" not in by_layer:
        for layer in method.used_layers():
            if str(layer) not in by_layer:
                method.context.refuse("reduction_factor", f"has no factor for layer {layer}")


def _width(method: MethodConfig, layer: int, hidden: int) -> int:
    """Returns the width of a layer's bottleneck."""
    found = method.context.config["reduction_factor"]
    by_layer: dict[str, Any] = found if isinstance(found, dict) else {"default": found}
    factor = by_layer[str(layer)] if str(layer) in by_layer else by_layer["default"]
    return max(int(hidden // factor), 1)
