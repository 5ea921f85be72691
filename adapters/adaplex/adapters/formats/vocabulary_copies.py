"""VocabularyCopies: the base's embedding and output layer as PEFT saves them beside an adapter.

PEFT saves them if the vocabulary was resized for the training, if an adapter targets them, or on
demand, and loads them over the base's. Sources: `save_embedding_layers` of
`peft.utils.save_and_load.get_peft_model_state_dict`, and `peft.utils.other`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from adaplex.adapters.checkpoint import Checkpoint
from adaplex.adapters.formats.base import Lowered
from adaplex.adapters.formats.lowering_context import PREFIX, LoweringContext
from adaplex.adapters.formats.modules_to_save import is_close, saved_modules
from adaplex.adapters.limits import AdapterLimits
from adaplex.adapters.program.base_spec import BaseModule, BaseSpec
from adaplex.adapters.program.program import ModuleProgram

BARE_PREFIX = "base_model."
"""Prefix of the keys of prompt learning."""
WRAPPED = ("token_adapter.base_layer.weight", "base_layer.weight", "original_module.weight")
"""Ends of the keys of a copy at a module that PEFT has wrapped."""
TRAINED = "modules_to_save.weight"
"""End of the key of a trained module's weight, saved a second time beside the copies."""


@dataclass(frozen=True)
class VocabularyCopies:
    """A checkpoint without such copies, the base with them, and those that differ from the base's
    own weights, [vocabulary, hidden] by module name.
    """

    checkpoint: Checkpoint
    base: BaseSpec
    differing: Mapping[str, Tensor]

    @classmethod
    def of(cls, checkpoint: Checkpoint, base: BaseSpec, limits: AdapterLimits) -> VocabularyCopies:
        """Finds the copies. Raises AdapterInvalid if they do not fit the base or each other."""
        context = LoweringContext(checkpoint, base, limits)
        context.check_modules_to_save()
        if context.refusals:  # the format refuses the field, with all others
            return cls(checkpoint, base, {})
        names, repeated = dict(_copies(context)), _repeated(context)
        if not names:
            return cls(checkpoint, base, {})
        rest = {k: t for k, t in checkpoint.tensors.items() if k not in names | repeated}
        found: dict[str, Tensor] = {}
        for key, module in names.items():
            tensor = checkpoint.tensors[key]
            if tensor.dim() == 2 and tensor.shape[0] != _tokens(module):
                context.refuse(
                    key,
                    f"has {tensor.shape[0]} tokens, the base has {_tokens(module)}: the adapter "
                    "was trained after the vocabulary was resized; serve the base as it was then",
                )
            elif context.check_shape(key, tensor, *_shape(module)) and not torch.equal(
                tensor, found.setdefault(module.name, tensor)
            ):
                context.refuse(key, "differs from another copy of the same weight")
        if base.tied and len(found) > 1 and not torch.equal(*list(found.values())[:2]):
            context.refuse(next(iter(names)), "differs between two modules that the base ties")
        context.raise_refusals()
        if base.tied and found:
            ends = [module.name for module in _ends(context)]
            found = dict.fromkeys(ends, next(iter(found.values())))
        differing = {name: t for name, t in found.items() if not _is_base(base, name, t)}

        def weight(name: str) -> Tensor:
            return differing[name].float() if name in differing else base.weight(name)

        return cls(
            Checkpoint(checkpoint.config, rest),
            replace(base, weight=weight) if differing else base,
            differing,
        )

    def applied(self, lowered: Lowered) -> Lowered:
        """Returns what the rest of the checkpoint was lowered to, with each copy that differs in
        the place of the base's weight. Raises AdapterInvalid if it cannot be.
        """
        if not self.differing:
            return lowered
        context = LoweringContext(self.checkpoint, self.base, AdapterLimits())
        programs = {program.module: program for program in lowered.modules}
        warnings = []
        for name, copy in self.differing.items():
            program = programs.get(name) or ModuleProgram(name)
            if lowered.invocation:
                context.refuse(name, "its saved copy changes tokens before the invocation")
            elif program.transform is not None:
                context.refuse(name, "is merged, and its saved copy differs from the base's weight")
            programs[name] = _with_weight(program, copy)
            warnings.append(f"{name}: served with the adapter's copy, which differs from the base")
        context.raise_refusals()
        return replace(
            lowered,
            modules=tuple(programs[name] for name in sorted(programs)),
            warnings=(*lowered.warnings, *warnings),
        )


def _copies(context: LoweringContext) -> Iterator[tuple[str, BaseModule]]:
    """Yields keys and modules of the copies."""
    tensors, saved, ends = context.tensors, saved_modules(context), _ends(context)
    if context.base.tied and context.config.get("ensure_weight_tying"):
        names = {module.name for module in ends}
        saved |= names if saved & names else frozenset()
    for module in ends:
        for prefix in (PREFIX, BARE_PREFIX):
            path = f"{prefix}{module.name}"
            yield from ((key, module) for end in WRAPPED if (key := f"{path}.{end}") in tensors)
            plain = f"{path}.weight"
            trained = module.name in saved or f"{path}.{TRAINED}" in tensors
            if plain in tensors and not trained:
                yield plain, module


def _repeated(context: LoweringContext) -> dict[str, BaseModule]:
    """Returns keys and modules of trained weights saved twice; refuses those that differ."""
    tensors, found = context.tensors, {}
    for module in _ends(context):
        plain, wrapped = (f"{PREFIX}{module.name}.{end}" for end in ("weight", TRAINED))
        if plain in tensors and wrapped in tensors:
            found[wrapped] = module
            if not torch.equal(tensors[plain], tensors[wrapped]):
                context.refuse(wrapped, f"differs from {plain}")
    return found


def _ends(context: LoweringContext) -> list[BaseModule]:
    """Returns the embedding and the output layer."""
    return [module for module in (context.embedding, context.head) if module is not None]


def _tokens(module: BaseModule) -> int:
    return module.in_features if module.kind == "embedding" else module.out_features


def _shape(module: BaseModule) -> tuple[int, int]:
    """Returns [vocabulary, hidden]."""
    hidden = module.out_features if module.kind == "embedding" else module.in_features
    return _tokens(module), hidden


def _is_base(base: BaseSpec, name: str, copy: Tensor) -> bool:
    """True if a copy equals the base's weight up to rounding."""
    try:
        return is_close(copy, base.weight(name).cpu())
    except KeyError:
        return False


def _with_weight(program: ModuleProgram, copy: Tensor) -> ModuleProgram:
    """Returns a program over the copy instead of the base's weight."""
    if program.weight is not None:
        return program
    if program.rows is None:
        return replace(program, weight=copy)
    weight = copy.clone()
    weight[list(program.rows.ids)] = program.rows.weight.to(copy.dtype)
    return replace(program, weight=weight, rows=None)
