"""AdapterHub: bottlenecks, LoRA, DoRA and (IA)^3 as its library `adapters` 1.3 writes them with
use_safetensors=True, alone or united (`ConfigUnion`), for llama-shaped models.

https://docs.adapterhub.ml/overview.html. Every tensor and every config field is accounted for, or
the adapter is refused with all the reasons at once.
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
DESCRIPTIVE = COMMON_FIELDS | {"config_id", "label2id", "model_class", "model_name", "type"}
UNITED = "union"
METHODS: Mapping[str | None, Callable[[MethodConfig], LoweredMethod]] = {
    None: lower_bottleneck,
    "bottleneck": lower_bottleneck,
    "lora": lower_lora,
    "prefix_tuning": lower_prefix,
}
"""`architecture` -> method."""
NEEDS = {
    "mtl_lora": "a task for each row",
    "prompt_tuning": "a layout that the library has for no model served here",
    "reft": "interventions at chosen positions of the prompt",
}
"""What a method that is not served would need."""
KEY = re.compile(
    r"(model\.)?(?P<place>prefix_tuning|layers\.\d+\.[\w.]+?)"
    r"\.(adapters|loras|prefix_tunings)\.(?P<name>[^.]+)\.(?P<tensor>.+)"
)
LAYER = re.compile(r"model\.layers\.(\d+)\..*")
VERSION = re.compile(r"adapters\.(\d+)\.(\d+)\..*")


class AdapterHub:
    """The format; see the module's docstring."""

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
        context.check_fields("AdapterHub", USED, DESCRIPTIVE)
        _check_model(context)
        configs = list(_configs(context))
        places = _places(context)
        context.raise_refusals()
        lowered = [_lower(context, where, config, places) for where, config in configs]
        for place in sorted(places if not context.refusals else ()):
            context.refuse(place, "is there, but the config names nothing that has it")
        modules: dict[str, ModuleProgram] = {}
        for module in (module for part in lowered for module in part.modules):
            other = modules.get(module.module)
            modules[module.module] = module if other is None else _united(other, module)
        if not modules and not context.refusals:
            context.refuse("config", f"adapts no module of the base {base.name}")
        context.raise_refusals()
        return Lowered(
            tuple(modules[name] for name in sorted(modules)),
            family=lowered[0].family if len(lowered) == 1 else "hybrid",
            semantics={
                f"{i}.{name}": value
                for i, part in enumerate(lowered)
                for name, value in part.semantics.items()
            },
        )


def _united(one: ModuleProgram, other: ModuleProgram) -> ModuleProgram:
    """A prefix and a bottleneck of one block; nothing else meets, as each takes its tensors."""
    assert {*one.primitives, *other.primitives} == {"bottleneck", "KV prefix"}
    return replace(
        one, bottleneck=one.bottleneck or other.bottleneck, prefix=one.prefix or other.prefix
    )


def _check_model(context: LoweringContext) -> None:
    """Refuses adapters of models whose layers the library takes apart in another way."""
    config, base = context.config, context.base
    kind = config.get("model_type")
    if not isinstance(kind, str) or kind not in PROJECTIONS:
        served = ", ".join(PROJECTIONS)
        context.refuse("model_type", f"{kind!r:.40} is not served; served are {served}")
    elif kind != base.model_type:
        context.refuse("model_type", f"is {kind}, the base {base.name} is {base.model_type}")
    if not isinstance(config.get("name"), str):
        context.refuse("name", "must be the name that the tensors are kept under")
    version = config.get("version")
    if not isinstance(version, str) or not VERSION.fullmatch(version):
        context.refuse("version", "must name the library that wrote it, such as adapters.1.3.0")


def _configs(context: LoweringContext) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """(where, method's config) of each method."""
    config = context.config.get("config")
    found = [("config", config)]
    if isinstance(config, dict) and config.get("architecture") == UNITED:
        united = config.get("configs")
        found = [(f"config.configs[{i}]", part) for i, part in enumerate(united or ())]
        if not isinstance(united, list) or not united:
            context.refuse("config.configs", "must be a list of objects")
            return
    for where, part in found:
        if not isinstance(part, dict):
            context.refuse(where, "must be an object")
            continue
        method = part.get("architecture")
        if (method is None or isinstance(method, str)) and method in METHODS:
            yield where, part
        else:
            need = f"; it needs {NEEDS[str(method)]}" if str(method) in NEEDS else ""
            context.refuse(f"{where}.architecture", f"{method!r:.40} is not served{need}")


def _places(context: LoweringContext) -> Places:
    """The tensors by place and name; refuses those that have none."""
    places: Places = {}
    for key, tensor in context.tensors.items():
        match = KEY.fullmatch(key)
        if match is None:
            places[key] = {}  # left over, where no method says more of it
        elif match["name"] != context.config.get("name"):
            context.refuse(key, f"is not of the adapter {context.config.get('name')!r:.80}")
        elif match["tensor"] in places.setdefault(match["place"], {}):
            context.refuse(key, "is given twice")
        else:
            places[match["place"]][match["tensor"]] = tensor
    return places


def _lower(
    context: LoweringContext, where: str, config: Mapping[str, Any], places: Places
) -> LoweredMethod:
    """One method; its refusals name its own fields behind `where`."""
    base = context.base
    inner = LoweringContext(Checkpoint(config, {}), base, context.limits)
    version = VERSION.fullmatch(context.config["version"])
    assert version is not None
    layers = sorted({int(m[1]) for name in base.modules if (m := LAYER.fullmatch(name))})
    part = MethodConfig(
        inner, places, tuple(layers), base.model_type, (int(version[1]), int(version[2]))
    )
    lowered = METHODS[config.get("architecture")](part)
    for refusal in inner.refusals:
        known = refusal.where in config or refusal.where == "reduction_factor"
        context.refuse(f"{where}.{refusal.where}" if known else refusal.where, refusal.reason)
    return lowered
