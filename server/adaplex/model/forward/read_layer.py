"""LayerReader: reads a layer of a base for the C decoder.

Parts have several names: the first whose linears or norms a layer has are used. What a part
computes is compared later, with a prompt; but a short prompt does not show everything, so unknown
parts and settings count as another shape.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from adaplex.model.forward.decoder_shape import (
    Attention,
    DecoderLayer,
    Linear,
    Mlp,
    Norm,
    OtherShape,
)
from adaplex.model.forward.read_parts import (
    first_found,
    parts_of,
    read_activation,
    read_linear,
    read_norm,
    require_no_more,
)
from adaplex.model.forward.read_rotary import RotaryReader
from adaplex.model.kernels.paged_kv import AttentionOptions
from adaplex.model.modules.attention import ATTEND_ATTRIBUTE

ATTENTIONS = (("self_attn",), ("attn",))
QKV = (("q_proj", "k_proj", "v_proj"), ("qkv_proj",), ("c_attn",))
OUTS = (("o_proj",), ("c_proj",))
HEAD_NORMS = ("q_norm", "k_norm")
GATED = (("gate_proj", "up_proj"), ("gate_up_proj",))
UNGATED = (("up_proj",), ("c_fc",))
DOWNS = (("down_proj",), ("c_proj",))
ACTIVATION_NAMES = (("act_fn",), ("activation_fn",), ("act",))
NORMS: tuple[tuple[str, str | None, str, str | None], ...] = (
    ("input_layernorm", None, "post_attention_layernorm", None),
    (
        "input_layernorm",
        "post_attention_layernorm",
        "pre_feedforward_layernorm",
        "post_feedforward_layernorm",
    ),
    ("ln_1", None, "ln_2", None),
)
"""Names of the norms before and after attention, and before and after the MLP."""

ATTENTION_SETTINGS = frozenset(
    {
        "attention_dropout",
        "attn_logit_softcapping",
        "config",
        "embed_dim",
        "head_dim",
        "is_causal",
        "is_cross_attention",
        "is_sliding",
        "layer_idx",
        "layer_type",
        "num_attention_heads",
        "num_heads",
        "num_key_value_groups",
        "num_key_value_heads",
        "reorder_and_upcast_attn",
        "residual_dropout",
        "scale_attn_by_inverse_layer_idx",
        "scale_attn_weights",
        "scaling",
        "sliding_window",
        "split_size",
        "training",
        ATTEND_ATTRIBUTE,
    }
)
"""Known attributes of attention: none of them changes more than the options of the interface.
`use_rope` of smollm3 is not among them, on purpose: each fourth layer of it has no positions."""


@dataclass(frozen=True)
class LayerReader:
    """Reads layers of these sizes."""

    hidden: int
    kv_heads: int
    head_dim: int
    rotary: RotaryReader

    def read(self, name: str, layer: Any, options: AttentionOptions) -> DecoderLayer:
        """Returns the layer with this name; attention has these options. Raises OtherShape."""
        parts = parts_of(layer)
        (attention,) = first_found(parts, ATTENTIONS, "attention")
        found = parts - {attention, "mlp"}
        norms = next((each for each in NORMS if found == {*each} - {None}), None)
        if norms is None:
            raise OtherShape(f"norms {', '.join(sorted(found))}")

        def norm(part: str) -> Norm:
            return read_norm(f"{name}.{part}", layer.get_submodule(part), self.hidden)

        def norm_after(part: str | None) -> Norm | None:
            return None if part is None else norm(part)

        before_attention, after_attention, before_mlp, after_mlp = norms
        return DecoderLayer(
            attention=self._attention(f"{name}.{attention}", getattr(layer, attention), options),
            mlp=self._mlp(f"{name}.mlp", layer.mlp),
            attention_norm=norm(before_attention),
            attention_out_norm=norm_after(after_attention),
            mlp_norm=norm(before_mlp),
            mlp_out_norm=norm_after(after_mlp),
        )

    def _attention(self, name: str, module: Any, options: AttentionOptions) -> Attention:
        parts = parts_of(module)
        qkv, (out,) = first_found(parts, QKV, "q, k and v"), first_found(parts, OUTS, "output")
        require_no_more(parts, {*qkv, out, *HEAD_NORMS}, "attention")
        settings = {setting for setting in vars(module) if not setting.startswith("_")}
        require_no_more(settings, ATTENTION_SETTINGS, "attention")
        if options.sinks is not None:
            raise OtherShape("attention with sinks")
        last = read_linear(module.get_submodule(out), self.hidden)
        queries, keys = last.backend.in_features, self.kv_heads * self.head_dim
        widths = (queries, keys, keys) if len(qkv) > 1 else (queries + 2 * keys,)
        q_norm, k_norm = (
            read_norm(f"{name}.{part}", module.get_submodule(part), self.head_dim)
            if part in parts
            else None
            for part in HEAD_NORMS
        )
        return Attention(
            name=name,
            qkv=self._linears(module, qkv, widths),
            out=last,
            q_norm=q_norm,
            k_norm=k_norm,
            rotary=self.rotary.read(getattr(module, "layer_type", None)),
            options=options,
        )

    def _mlp(self, name: str, module: Any) -> Mlp:
        parts = parts_of(module)
        gate_up = first_found(parts, (*GATED, *UNGATED), "linears before the activation")
        (down,) = first_found(parts, DOWNS, "linear after the activation")
        (activation,) = first_found(parts, ACTIVATION_NAMES, "activation")
        require_no_more(parts, {*gate_up, down, activation}, "an MLP")
        gated = gate_up in GATED
        last = read_linear(module.get_submodule(down), self.hidden)
        middle = last.backend.in_features
        widths = (2 * middle,) if gated and len(gate_up) == 1 else (middle,) * len(gate_up)
        return Mlp(
            name=name,
            gate_up=self._linears(module, gate_up, widths),
            down=last,
            gated=gated,
            activation=read_activation(module.get_submodule(activation)),
        )

    def _linears(
        self, module: Any, names: tuple[str, ...], widths: tuple[int, ...]
    ) -> tuple[Linear, ...]:
        """Returns linears of the residual stream that have these numbers of outputs."""
        return tuple(
            read_linear(module.get_submodule(name), width, self.hidden)
            for name, width in zip(names, widths, strict=True)
        )
