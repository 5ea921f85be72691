"""AdapterHub: bottlenecks, LoRA, DoRA, (IA)^3 and prefixes as its library `adapters` 1.3 writes
them with use_safetensors=True, alone or several in one (`ConfigUnion`), for llama-shaped models.

https://docs.adapterhub.ml/overview.html. Every tensor and config field must be accounted for, or
the adapter is refused with all reasons at once.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Any

from adaplex.adapters.checkpoint import Checkpoint
from adaplex.adapters.formats.adapterhub.bottleneck import lower_bottleneck
from adaplex.adapters.formats.adapterhub.lora import PROJECTIONS, lower_lora
from adaplex.adapters.formats.adapterhub.method_config import LoweredMethod, MethodConfig, Places
from adaplex.adapters.formats.adapterhub.prefix import lower_prefix
from adaplex.adapters.formats.base import FormatRow, Lowered
from adaplex.adapters.formats.lowering_context import COMMON_FIELDS, LoweringContext
from adaplex.adapters.limits import AdapterLimits
from adaplex.adapters.program.base_spec import BaseSpec
from adaplex.adapters.program.program import ModuleProgram

USED = frozenset(["config", "hidden_size", "model_type", "name", "version"])
"""Fields of adapter_config.json that lowering reads."""
HARMLESS = COMMON_FIELDS | {"config_id", "label2id", "model_class", "model_name", "type"}
"""Fields of adapter_config.json that do not change the answer."""
UNION = "union"
"""The `architecture` of a ConfigUnion, AdapterHub's bundle of several methods."""
METHODS: Mapping[str | None, Callable[[MethodConfig], LoweredMethod]] = {
    None: lower_bottleneck,
    "bottleneck": lower_bottleneck,
    "lora": lower_lora,
    "prefix_tuning": lower_prefix,
}
"""Function that lowers a method, by the `architecture` of its config."""
NEEDS = {
    "mtl_lora": "a task for each row",
    "prompt_tuning": "a layout that the library has for no model served here",
    "reft": "interventions at chosen positions of the prompt",
}
"""Feature that each unsupported `architecture` would need."""
KEY = re.compile(
    r"(model\.)?(?P<place>prefix_tuning|layers\.\d+\.[\w.]+?)"
    r"\.(adapters|loras|prefix_tunings)\.(?P<name>[^.]+)\.(?P<tensor>.+)"
)
LAYER = re.compile(r"model\.layers\.(\d+)\..*")
VERSION = re.compile(r"adapters\.(\d+)\.(\d+)\..*")


class AdapterHub:
    """Format of AdapterHub; see the module's docstring."""

    family = "bottleneck"
    semantic_fields = None
    about = FormatRow(
        "AdapterHub's bottlenecks (Houlsby, Pfeiffer, parallel), LoRA, DoRA, IA3, prefixes, unions",
        ("bottleneck", "low-rank", "output scale", "KV prefix"),
        "gates (UniPELT), Compacter, invertible adapters, norms in the bottleneck, VeRA, ReFT",
        checkpoint="an AdapterHub directory",
    )

    def lower(self, checkpoint: Checkpoint, base: BaseSpec, limits: AdapterLimits) -> Lowered:
        """See Format."""
        context = LoweringContext(checkpoint, base, limits)
        context.check_fields("AdapterHub", USED, HARMLESS)
        _check_model(context)
        configs = list(_configs(context))
        places = _places(context)
        context.raise_refusals()
        lowered = [_lower(context, where, config, places) for where, config in configs]
        for place in sorted(places if not context.refusals else ()):
            context.refuse(place, "is present, but the config names no method that uses it")
        modules: dict[str, ModuleProgram] = {}
        for module in (module for method in lowered for module in method.modules):
            other = modules.get(module.module)
            modules[module.module] = module if other is None else _bundled(other, module)
        if not modules and not context.refusals:
            context.refuse("config", f"adapts no module of the base {base.name}")
        context.raise_refusals()
        return Lowered(
            tuple(modules[name] for name in sorted(modules)),
            family=lowered[0].family if len(lowered) == 1 else "hybrid",
            semantics={
                f"{i}.{name}": value
                for i, method in enumerate(lowered)
                for name, value in method.semantics.items()
            },
        )


def _bundled(one: ModuleProgram, other: ModuleProgram) -> ModuleProgram:
    """Returns the program of a block with a prefix and a bottleneck. No other methods share a
    module, because each pops its tensors.
    """
    assert {*one.primitives, *other.primitives} == {"bottleneck", "KV prefix"}
    return replace(
        one, bottleneck=one.bottleneck or other.bottleneck, prefix=one.prefix or other.prefix
    )


def _check_model(context: LoweringContext) -> None:
    """Refuses adapters of other models, whose modules may have other names in the library."""
    config, base = context.config, context.base
    kind = config.get("model_type")
    if not isinstance(kind, str) or kind not in PROJECTIONS:
        served = ", ".join(PROJECTIONS)
        context.refuse("model_type", f"{kind!r:.40} is not served; served are {served}")
    elif kind != base.model_type:
        context.refuse("model_type", f"is {kind}, but the base {base.name} is {base.model_type}")
    if not isinstance(config.get("name"), str):
        context.refuse("name", "must be the adapter's name in the tensor keys")
    version = config.get("version")
    if not isinstance(version, str) or not VERSION.fullmatch(version):
        context.refuse("version", "must be the version of the library, such as adapters.1.3.0")


def _configs(context: LoweringContext) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Yields the path and the config of each method; refuses methods that are not served."""
    config = context.config.get("config")
    found = [("config", config)]
    if isinstance(config, dict) and config.get("architecture") == UNION:
        members = config.get("configs")
        found = [(f"config.configs[{i}]", member) for i, member in enumerate(members or ())]
        if not isinstance(members, list) or not members:
            context.refuse("config.configs", "must be a list of objects")
            return
    for where, member in found:
        if not isinstance(member, dict):
            context.refuse(where, "must be an object")
            continue
        method = member.get("architecture")
        if (method is None or isinstance(method, str)) and method in METHODS:
            yield where, member
        else:
            need = f"; it needs {NEEDS[str(method)]}" if str(method) in NEEDS else ""
            context.refuse(f"{where}.architecture", f"{method!r:.40} is not served{need}")


def _places(context: LoweringContext) -> Places:
    """Returns the tensors by place and name; refuses tensors of other adapters."""
    places: Places = {}
    for key, tensor in context.tensors.items():
        match = KEY.fullmatch(key)
        if match is None:
            places[key] = {}  # no method pops it, so that it is refused
        elif match["name"] != context.config.get("name"):
            reason = f"does not belong to the adapter {context.config.get('name')!r:.80}"
            context.refuse(key, reason)
        elif match["tensor"] in places.setdefault(match["place"], {}):
            context.refuse(key, "is given twice")
        else:
            places[match["place"]][match["tensor"]] = tensor
    return places


def _lower(
    context: LoweringContext, where: str, config: Mapping[str, Any], places: Places
) -> LoweredMethod:
    """Lowers one method. Refusals of its fields are prefixed with `where`."""
    base = context.base
    inner = LoweringContext(Checkpoint(config, {}), base, context.limits)
    version = VERSION.fullmatch(context.config["version"])
    assert version is not None
    layers = sorted({int(m[1]) for name in base.modules if (m := LAYER.fullmatch(name))})
    method = MethodConfig(
        inner, places, tuple(layers), base.model_type, (int(version[1]), int(version[2]))
    )
    lowered = METHODS[config.get("architecture")](method)
    for refusal in inner.refusals:
        known = refusal.where in config or refusal.where == "reduction_factor"
        context.refuse(f"{where}.{refusal.where}" if known else refusal.where, refusal.reason)
    return lowered
