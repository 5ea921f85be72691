"""A lowered adapter applied to a plain transformers model, as its primitives say."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import DynamicCache, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from adaplex.adapters.program import AdapterProgram, BaseModule, BaseSpec, ModuleProgram


def describe(model: PreTrainedModel, name: str) -> BaseSpec:
    """The spec of a plain model, made without the server's loader."""
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    modules: dict[str, BaseModule] = {}
    biases: dict[str, Tensor] = {}
    for path, module in model.named_modules():
        if (found := _described(path, module, head, embedding)) is not None:
            modules[path] = found
            if found.has_bias:
                biases[path] = module.bias.detach().float().clone()  # type: ignore[operator,union-attr]
    config = model.config
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    features = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return BaseSpec(
        name,
        "digest",
        config.model_type,
        modules,
        biases,
        kv_shapes=((heads, features, features),) * config.num_hidden_layers,
        weight=lambda name: _weight(model, name),
    )


def _described(path: str, module: Any, head: Any, embedding: Any) -> BaseModule | None:
    weight = getattr(module, "weight", None)
    has_bias = getattr(module, "bias", None) is not None
    if isinstance(module, nn.Linear | Conv1D):
        turned = isinstance(module, Conv1D)
        outputs, inputs = weight.T.shape if turned else weight.shape
        return BaseModule(
            path, "linear", inputs, outputs, has_bias, module is head, transposed=turned
        )
    if module is embedding:
        return BaseModule(path, "embedding", *weight.shape)
    if isinstance(weight, nn.Parameter) and weight.dim() == 1:
        return BaseModule(path, "norm", weight.numel(), weight.numel(), has_bias)
    last = path.rpartition(".")[2]
    parts = {"self_attn": "attention", "attn": "attention", "mlp": "mlp"}
    if last in parts and (digits := [int(word) for word in path.split(".") if word.isdigit()]):
        hidden = embedding.weight.shape[1]
        part: Any = parts[last]
        return BaseModule(path, "block", hidden, hidden, layer=digits[0], part=part)
    return None


def _weight(model: PreTrainedModel, name: str) -> Tensor:
    module: Any = model.get_submodule(name)
    weight: Tensor = module.weight.detach().float()
    return weight.T if isinstance(module, Conv1D) else weight


class Applied:
    """A plain model with an adapter's primitives put in."""

    def __init__(self, model: PreTrainedModel, program: AdapterProgram) -> None:
        """The model is changed."""
        self.model, self.program = model.eval(), program
        for module in program.modules:
            _apply(model.get_submodule(module.module), module)

    @torch.no_grad()
    def logits(self, tokens: list[int]) -> Tensor:
        """[vocabulary] after the last token."""
        embeddings = self.model.get_input_embeddings()(torch.tensor([tokens]))
        virtual = [m.virtual for m in self.program.modules if m.virtual is not None]
        inputs = torch.cat([*(tokens[None] for tokens in virtual), embeddings], dim=1)
        out = self.model(inputs_embeds=inputs, past_key_values=self._prefix())
        result: Tensor = out.logits[0, -1]
        return result.float()

    def _prefix(self) -> DynamicCache | None:
        prefixes = [m.prefix for m in self.program.modules if m.prefix is not None]
        if not prefixes:
            return None
        return DynamicCache(
            [(p.keys.transpose(0, 1)[None], p.values.transpose(0, 1)[None]) for p in prefixes]
        )


def _apply(module: Any, program: ModuleProgram) -> None:
    if isinstance(module, nn.Linear | Conv1D):
        module.forward = _Linear(module, program)
        return
    if program.weight is not None:
        module.weight = nn.Parameter(program.weight.clone())
    if program.bias is not None:
        module.register_forward_hook(lambda _, inputs, y: y + program.bias)


class _Linear:
    """y = output_scale * (W (input_scale * x) + base bias) + b (a (input_scale * x)) + bias."""

    def __init__(self, module: Any, program: ModuleProgram) -> None:
        own = module.weight.T if isinstance(module, Conv1D) else module.weight
        self.weight = own if program.weight is None else program.weight
        self.bias, self.program = module.bias, program

    def __call__(self, x: Tensor) -> Tensor:
        program = self.program
        if program.input_scale is not None:
            x = x * program.input_scale
        y = functional.linear(x, self.weight, self.bias)
        if program.output_scale is not None:
            y = y * program.output_scale
        if program.low_rank is not None:
            y = y + x @ program.low_rank.a.float().T @ program.low_rank.b.float().T
        return y if program.bias is None else y + program.bias
