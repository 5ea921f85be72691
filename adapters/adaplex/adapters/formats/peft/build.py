"""PEFT itself, on trees of linears that have the base's names. The only file that imports it.

A tree holds the modules that are adapted and nothing else. PEFT puts its layers in, takes the
checkpoint's tensors and merges; what it makes of one linear is what it would make of that linear
in the whole model.
"""

from __future__ import annotations

import copy
import threading
from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn

from adaplex.adapters.errors import AdapterInvalid
from adaplex.adapters.formats.peft.kinds import PeftKind
from adaplex.adapters.program.base_spec import BaseModule

ADAPTER = "default"


@dataclass(frozen=True)
class SavedTensor:
    """A tensor that PEFT would save."""

    shape: tuple[int, ...]
    is_real: bool


def is_installed() -> bool:
    """Whether the extra `adaplex[peft]` is here."""
    return find_spec("peft") is not None


@dataclass(frozen=True)
class Recipe:
    """A config, checked: what PEFT is told about every module alike, and about each by pattern."""

    kind: PeftKind
    fields: Mapping[str, Any]
    patterns: Mapping[str, Mapping[str, Any]]
    """Field -> module -> value; PEFT never sees the patterns that gave them."""
    biases: Mapping[str, Tensor]

    def build(
        self,
        modules: Iterable[BaseModule],
        weights: Mapping[str, Tensor] | None = None,
        *,
        meta: bool = False,
    ) -> Any:
        """A PeftModel over the modules, with `weights` [out, in] or else zeros. `meta` takes no
        memory. Raises AdapterInvalid with what PEFT says against the config.
        """
        peft = _peft()
        known = list(modules)
        place: AbstractContextManager[object] = torch.device("meta") if meta else nullcontext()
        with _peft_errors(self.kind.name), place:
            tree = _tree(known, weights or {}, self.biases)
            model = peft.PeftModel(tree, self._config(known), ADAPTER)
        return model.eval()

    def signature(self, module: BaseModule) -> object:
        """Modules of the same signature have tensors of the same shapes."""
        values = tuple(self.patterns[name].get(module.name) for name in sorted(self.patterns))
        return module.in_features, module.out_features, module.name in self.biases, values

    def _config(self, modules: list[BaseModule]) -> Any:
        """PEFT's own config: modules by their whole names, and nothing but plain values."""
        peft = _peft()
        from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

        config: Any = PEFT_TYPE_TO_CONFIG_MAPPING[peft.PeftType(self.kind.name)]
        fields = dict(self.fields)
        for name, values in self.patterns.items():
            fields[name] = {m.name: values[m.name] for m in modules if m.name in values}
        if "fan_in_fan_out" in config.__dataclass_fields__:
            fields["fan_in_fan_out"] = any(module.transposed for module in modules)
        return config(target_modules=[module.name for module in modules], **fields)


@cache
def _peft() -> Any:
    """PEFT, told that BOFT's CUDA extension is not to be had: it would be compiled at an upload."""
    import peft
    from peft.tuners.boft import layer

    layer.get_fbd_cuda = lambda: None
    return peft


def saved_tensors(model: Any) -> dict[str, SavedTensor]:
    """Every tensor that PEFT would save of the model."""
    from peft import get_peft_model_state_dict

    state = get_peft_model_state_dict(model, save_embedding_layers=False)
    return {key: SavedTensor(tuple(t.shape), t.is_floating_point()) for key, t in state.items()}


def load_tensors(model: Any, tensors: Mapping[str, Tensor], *, assign: bool = False) -> None:
    """Puts a checkpoint's tensors in. With `assign` they replace those of a model on the meta
    device. Raises AdapterInvalid.
    """
    from peft import set_peft_model_state_dict

    state = {key: t.float() if t.is_floating_point() else t for key, t in tensors.items()}
    with _peft_errors(model.peft_config[ADAPTER].peft_type.value):
        result: Any = set_peft_model_state_dict(model, state, ADAPTER, low_cpu_mem_usage=assign)
    for key in result.unexpected_keys:
        raise AdapterInvalid.because(key, "is not a tensor that PEFT takes for this config")


def merge_alone(
    recipe: Recipe, module: BaseModule, weight: Tensor, tensors: Mapping[str, Tensor]
) -> Any:
    """A linear of this weight with the adapter merged in, from a tree of its own."""
    model = recipe.build([module], {module.name: weight})
    load_tensors(model, tensors)
    layer = _layer(model, module.name)
    with torch.no_grad(), _peft_errors(recipe.kind.name):
        layer.merge()
    return layer.get_base_layer()


class SharedTree:
    """A tree of all modules, for kinds whose modules share tensors; built when first needed.
    Thread-safe.
    """

    def __init__(
        self, recipe: Recipe, modules: tuple[BaseModule, ...], tensors: Mapping[str, Tensor]
    ) -> None:
        self._recipe, self._modules, self._tensors = recipe, modules, tensors
        self._lock = threading.Lock()
        self._model: Any = None

    def merge(self, module: BaseModule, weight: Tensor) -> Any:
        """A linear of this weight with the adapter merged in."""
        with self._lock:
            if self._model is None:
                self._model = self._build()
        found = _layer(self._model, module.name)
        layer = copy.copy(found)  # of its own are only the linear and what says that it is merged
        layer._modules = dict(found._modules)
        layer.base_layer = _linear(module, weight, self._recipe.biases.get(module.name))
        layer.merged_adapters = []
        with torch.no_grad(), _peft_errors(self._recipe.kind.name):
            layer.merge()
        return layer.get_base_layer()

    def _build(self) -> Any:
        """With zeros for weights, or on the meta device where the checkpoint holds all the rest."""
        if not self._recipe.kind.saves_all:
            model = self._recipe.build(self._modules)
            load_tensors(model, self._tensors)
            return model
        model = self._recipe.build(self._modules, meta=True)
        for module in self._modules:  # PEFT moves what it loads to where the linear is
            bias = self._recipe.biases.get(module.name)
            _layer(model, module.name).base_layer = _linear(module, None, bias)
        load_tensors(model, self._tensors, assign=True)
        assert not any(t.is_meta for t in (*model.parameters(), *model.buffers()))
        return model


def _layer(model: Any, name: str) -> Any:
    """PEFT's layer in the place of a linear."""
    return model.base_model.model.get_submodule(name)


def _tree(
    modules: Iterable[BaseModule], weights: Mapping[str, Tensor], biases: Mapping[str, Tensor]
) -> nn.Module:
    """Modules within modules, as their names say."""
    root = nn.Module()
    for module in modules:
        *path, last = module.name.split(".")
        parent = root
        for part in path:
            if part not in parent._modules:
                parent.add_module(part, nn.Module())
            parent = parent.get_submodule(part)
        linear = _linear(module, weights.get(module.name), biases.get(module.name))
        parent.add_module(last, linear)
    return root


def _linear(module: BaseModule, weight: Tensor | None, bias: Tensor | None) -> Any:
    """A linear as the base has it, so GPT-2's Conv1D where it is one; zeros take no memory."""
    if weight is None:
        weight = torch.zeros(()).expand(module.out_features, module.in_features)
    else:
        weight = weight.detach().float().cpu().clone()
    linear: Any
    if module.transposed:
        from transformers.pytorch_utils import Conv1D

        linear = Conv1D(1, 1)
        linear.nf, linear.nx = module.out_features, module.in_features
        weight = weight.T.contiguous() if weight.stride(0) else weight.T
    else:
        linear = nn.Linear(1, 1, bias=False)
        linear.in_features, linear.out_features = module.in_features, module.out_features
    linear.weight = nn.Parameter(weight, requires_grad=False)
    own = None if bias is None else bias.detach().float().cpu().clone()
    linear.bias = None if own is None else nn.Parameter(own, requires_grad=False)
    return linear


@contextmanager
def _peft_errors(kind: str) -> Iterator[None]:
    """Whatever PEFT raises about an adapter, as our error."""
    try:
        yield
    except AdapterInvalid:
        raise
    except Exception as error:  # of all kinds: what the tensors and fields lead to within PEFT
        reason = " ".join(str(error).split()) or type(error).__name__
        raise AdapterInvalid.because(kind, f"PEFT cannot apply it: {reason:.400}") from error
