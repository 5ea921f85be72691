"""Runs PEFT on trees of linears that have the base's names. The only file that imports PEFT.

A tree contains only the adapted modules. PEFT injects its layers, loads the checkpoint's tensors
and merges; the merged weight of a linear equals the one in the whole model.
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
"""Name of the adapter in PEFT's models."""


@dataclass(frozen=True)
class SavedTensor:
    """Shape and kind of a tensor that PEFT would save."""

    shape: tuple[int, ...]
    is_real: bool
    """True for floating-point, False for integer tensors."""


def is_installed() -> bool:
    """True if the extra `adaplex[peft]` is installed."""
    return find_spec("peft") is not None


@dataclass(frozen=True)
class Recipe:
    """A checked config, from which PEFT models of any of its modules are built."""

    kind: PeftKind
    fields: Mapping[str, Any]
    """Config fields that apply to all modules."""
    patterns: Mapping[str, Mapping[str, Any]]
    """Config field -> module -> value. PEFT never reads the patterns that were matched."""
    biases: Mapping[str, Tensor]
    """Biases of the base by module name."""

    def build(
        self,
        modules: Iterable[BaseModule],
        weights: Mapping[str, Tensor] | None = None,
        *,
        meta: bool = False,
    ) -> Any:
        """Returns a PeftModel over the modules, with `weights` [out, in], or zeros where missing.

        With `meta` it is built on the meta device, without memory. Raises AdapterInvalid with
        PEFT's error if PEFT rejects the config.
        """
        peft = _peft()
        known = list(modules)
        place: AbstractContextManager[object] = torch.device("meta") if meta else nullcontext()
        with _peft_errors(self.kind.name), place:
            tree = _tree(known, weights or {}, self.biases)
            model = peft.PeftModel(tree, self._config(known), ADAPTER)
        return model.eval()

    def signature(self, module: BaseModule) -> object:
        """Returns a key that is equal for modules whose tensors have the same shapes."""
        values = tuple(self.patterns[name].get(module.name) for name in sorted(self.patterns))
        return module.in_features, module.out_features, module.name in self.biases, values

    def _config(self, modules: list[BaseModule]) -> Any:
        """Returns PEFT's config, with full module names instead of patterns."""
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
    """Returns the module `peft`, with BOFT's CUDA extension disabled, because PEFT would compile it
    during an upload.
    """
    import peft
    from peft.tuners.boft import layer

    layer.get_fbd_cuda = lambda: None
    return peft


def saved_tensors(model: Any) -> dict[str, SavedTensor]:
    """Returns the tensors that PEFT would save for the model, by key."""
    from peft import get_peft_model_state_dict

    state = get_peft_model_state_dict(model, save_embedding_layers=False)
    return {key: SavedTensor(tuple(t.shape), t.is_floating_point()) for key, t in state.items()}


def load_tensors(model: Any, tensors: Mapping[str, Tensor], *, assign: bool = False) -> None:
    """Loads a checkpoint's tensors into a model. With `assign` they replace tensors on the meta
    device. Raises AdapterInvalid.
    """
    from peft import set_peft_model_state_dict

    state = {key: t.float() if t.is_floating_point() else t for key, t in tensors.items()}
    with _peft_errors(model.peft_config[ADAPTER].peft_type.value):
        result: Any = set_peft_model_state_dict(model, state, ADAPTER, low_cpu_mem_usage=assign)
    for key in result.unexpected_keys:
        raise AdapterInvalid.because(key, "is not a tensor that PEFT loads for this config")


def merge_alone(
    recipe: Recipe, module: BaseModule, weight: Tensor, tensors: Mapping[str, Tensor]
) -> Any:
    """Returns a linear of this weight with the adapter merged, using a tree of this module only."""
    model = recipe.build([module], {module.name: weight})
    load_tensors(model, tensors)
    layer = _layer(model, module.name)
    with torch.no_grad(), _peft_errors(recipe.kind.name):
        layer.merge()
    return layer.get_base_layer()


class SharedTree:
    """A tree of all modules, for kinds whose modules share tensors. Built on first use.
    Thread-safe.
    """

    def __init__(
        self, recipe: Recipe, modules: tuple[BaseModule, ...], tensors: Mapping[str, Tensor]
    ) -> None:
        self._recipe, self._modules, self._tensors = recipe, modules, tensors
        self._lock = threading.Lock()
        self._model: Any = None

    def merge(self, module: BaseModule, weight: Tensor) -> Any:
        """Returns a linear of this weight with the adapter merged."""
        with self._lock:
            if self._model is None:
                self._model = self._build()
        found = _layer(self._model, module.name)
        layer = copy.copy(found)  # shares all but the linear and the list of merged adapters
        layer._modules = dict(found._modules)
        layer.base_layer = _linear(module, weight, self._recipe.biases.get(module.name))
        layer.merged_adapters = []
        with torch.no_grad(), _peft_errors(self._recipe.kind.name):
            layer.merge()
        return layer.get_base_layer()

    def _build(self) -> Any:
        """Returns the model with zeros for weights, built on the meta device if the checkpoint
        contains all other tensors.
        """
        if not self._recipe.kind.saves_all:
            model = self._recipe.build(self._modules)
            load_tensors(model, self._tensors)
            return model
        model = self._recipe.build(self._modules, meta=True)
        for module in self._modules:  # PEFT moves loaded tensors to the linear's device
            bias = self._recipe.biases.get(module.name)
            _layer(model, module.name).base_layer = _linear(module, None, bias)
        load_tensors(model, self._tensors, assign=True)
        assert not any(t.is_meta for t in (*model.parameters(), *model.buffers()))
        return model


def _layer(model: Any, name: str) -> Any:
    """Returns the PEFT layer that replaced a linear."""
    return model.base_model.model.get_submodule(name)


def _tree(
    modules: Iterable[BaseModule], weights: Mapping[str, Tensor], biases: Mapping[str, Tensor]
) -> nn.Module:
    """Returns a tree of the modules, nested by the components of their names."""
    root = nn.Module()
    for module in modules:
        *path, last = module.name.split(".")
        parent = root
        for word in path:
            if word not in parent._modules:
                parent.add_module(word, nn.Module())
            parent = parent.get_submodule(word)
        linear = _linear(module, weights.get(module.name), biases.get(module.name))
        parent.add_module(last, linear)
    return root


def _linear(module: BaseModule, weight: Tensor | None, bias: Tensor | None) -> Any:
    """Returns a linear, or GPT-2's Conv1D if the base has one; without a weight, its zeros share
    one element of memory.
    """
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
    """Context manager that converts any exception of PEFT to AdapterInvalid naming `kind`."""
    try:
        yield
    except AdapterInvalid:
        raise
    except Exception as error:  # untrusted fields and tensors may raise anything within PEFT
        reason = " ".join(str(error).split()) or type(error).__name__
        raise AdapterInvalid.because(kind, f"PEFT cannot apply it: {reason:.400}") from error
