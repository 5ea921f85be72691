"""Virtual tokens before the prompt: prompt tuning, P-tuning, multitask prompt tuning and CPT, as HF
PEFT 0.21 writes them.

PEFT saves the output of its prompt encoders, so the tokens are read as embeddings. Only multitask
prompt tuning saves factors: the embeddings are multiplied elementwise by cols[task] rows[task].
`task_id`, a config field of ours, selects the task.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import Any

from torch import Tensor

from adaplex.adapters.checkpoint import Checkpoint
from adaplex.adapters.errors import AdapterTooLarge
from adaplex.adapters.formats.base import FormatRow, Lowered
from adaplex.adapters.formats.lowering_context import COMMON_FIELDS, LoweringContext, is_rank
from adaplex.adapters.formats.peft_modules import saved_programs, tensors_by_module
from adaplex.adapters.limits import AdapterLimits
from adaplex.adapters.program.base_spec import BaseModule, BaseSpec
from adaplex.adapters.program.program import ModuleProgram

TOKENS = "prompt_embeddings"
MODULES = "base_model."
"""Prefix of a module's keys, shorter than PREFIX because prompt learning wraps no model."""
USED = frozenset(["peft_type", "modules_to_save"])
"""Config fields that change the answer; they enter the digest."""
SERVED = ("virtual tokens", "replaced weight")
"""Primitives of these families, for the table."""
EMBEDDING = "an embedding trained as a whole, which PEFT does not use beside virtual tokens"
"""Refused by these families; for the table and for error messages."""
COLS, ROWS = "prefix_task_cols", "prefix_task_rows"
LEARNED = frozenset(
    [
        "num_virtual_tokens",
        "token_dim",
        "num_transformer_submodules",
        "num_attention_heads",
        "num_layers",
    ]
)
"""Sizes in every config of prompt learning, which are checked against the base."""
HARMLESS = COMMON_FIELDS | frozenset(
    [
        "prompt_tuning_init",
        "prompt_tuning_init_text",
        "prompt_tuning_init_state_dict_path",
        "prompt_tuning_init_task",
        "tokenizer_name_or_path",
        "tokenizer_kwargs",
        "encoder_reparameterization_type",
        "encoder_hidden_size",
        "encoder_num_layers",
        "encoder_dropout",
        "cpt_token_ids",
        "cpt_mask",
        "cpt_tokens_type_mask",
        "opt_weighted_loss_type",
        "opt_loss_decay_factor",
        "opt_projection_epsilon",
        "opt_projection_format_epsilon",
    ]
)
"""Config fields that do not change the answer."""


class PromptTuning:
    """Format of prompt tuning, P-tuning and CPT, which save the virtual tokens themselves."""

    def __init__(self, family: str, title: str) -> None:
        self.family, self.about = family, FormatRow(title, SERVED, EMBEDDING)
        self.semantic_fields = USED

    def lower(self, checkpoint: Checkpoint, base: BaseSpec, limits: AdapterLimits) -> Lowered:
        """See Format."""
        context = LoweringContext(checkpoint, base, limits)
        context.check_fields(self.family, USED | LEARNED, HARMLESS)
        count, embedding = check_virtual_tokens(context), _embedding(context)
        saved = lower_saved_modules(context, self.family, [TOKENS])
        tokens = context.tensors[TOKENS]
        context.check_shape(TOKENS, tokens, count, embedding.out_features)
        return _lowered(context, embedding, tokens.float(), saved)


class MultitaskPromptTuning:
    """Format of multitask prompt tuning; see the module's docstring."""

    family = "multitask-prompt-tuning"
    semantic_fields = USED | {"task_id"}
    about = FormatRow("multitask prompt tuning", SERVED, EMBEDDING)

    def lower(self, checkpoint: Checkpoint, base: BaseSpec, limits: AdapterLimits) -> Lowered:
        """See Format."""
        context = LoweringContext(checkpoint, base, limits)
        used = self.semantic_fields | LEARNED | {"num_tasks", "num_ranks"}
        context.check_fields(self.family, used, HARMLESS)
        count, tasks = check_virtual_tokens(context), context.config.get("num_tasks", 1)
        ranks = context.config.get("num_ranks", 1)
        context.check_kind("num_tasks", is_rank(tasks), "a positive integer")
        context.check_kind("num_ranks", is_rank(ranks), "a positive integer")
        embedding = _embedding(context)
        saved = lower_saved_modules(context, self.family, [TOKENS, COLS, ROWS])
        task, hidden = _task(context, tasks), embedding.out_features
        tokens, cols, rows = (context.tensors[key] for key in (TOKENS, COLS, ROWS))
        context.check_shape(TOKENS, tokens, count, hidden)
        context.check_shape(COLS, cols, tasks, count, ranks)
        context.check_shape(ROWS, rows, tasks, ranks, hidden)
        context.raise_refusals()
        factor = cols[task].float() @ rows[task].float()
        return _lowered(context, embedding, tokens.float() * factor, saved)


def check_virtual_tokens(context: LoweringContext) -> int:
    """Returns the number of virtual tokens; 0, with a refusal, if the field is of the wrong kind.

    Raises AdapterTooLarge if the number exceeds the limit.
    """
    count = context.config.get("num_virtual_tokens")
    if not context.check_kind("num_virtual_tokens", is_rank(count), "a positive integer"):
        return 0
    assert isinstance(count, int)
    if count > context.limits.max_virtual_tokens:
        raise AdapterTooLarge(
            f"num_virtual_tokens is {count}, the limit is {context.limits.max_virtual_tokens}",
            field="num_virtual_tokens",
        )
    if context.config.get("num_transformer_submodules") not in (None, 1):
        context.refuse("num_transformer_submodules", "must be 1, as decoders have one")
    return count


def lower_saved_modules(
    context: LoweringContext, family: str, keys: Collection[str]
) -> list[ModuleProgram]:
    """Returns the programs of fully trained modules, which are the only tensors allowed besides
    `keys`. Raises AdapterInvalid with every refusal so far.
    """
    for key in sorted(set(keys) - context.tensors.keys()):
        context.refuse(key, "is missing")
    context.check_modules_to_save()
    context.raise_refusals()
    found = tensors_by_module(context, family, (), shared=keys, prefix=MODULES)
    saved = saved_programs(context, found)
    for name in sorted(found.keys() - context.base.modules.keys()):
        context.refuse(name, f"the base {context.base.name} has no such module")
    context.raise_refusals()
    return [program for program in saved if program is not None]


def check_size(context: LoweringContext, name: str, expected: int) -> None:
    """Refuses a size in the config that differs from the base's."""
    found: Any = context.config.get(name)
    if found not in (None, expected):
        context.refuse(name, f"is {found!r:.40}, but the base {context.base.name} has {expected}")


def _embedding(context: LoweringContext) -> BaseModule:
    """Returns the base's input embedding. Raises AdapterInvalid if none is known."""
    for module in context.base.modules.values():
        if module.kind == "embedding":
            check_size(context, "token_dim", module.out_features)
            return module
    context.refuse("peft_type", f"needs an input embedding, which {context.base.name} lacks")
    context.raise_refusals()
    raise AssertionError


def _task(context: LoweringContext, tasks: int) -> int:
    """Returns the task to serve. Raises AdapterInvalid."""
    task = context.config.get("task_id", 0 if tasks == 1 else None)
    if type(task) is not int or not 0 <= task < tasks:
        context.refuse("task_id", f"must be the task to serve, from 0 to {tasks - 1}")
        context.raise_refusals()
    return int(task)


def sorted_by_module(programs: Iterable[ModuleProgram]) -> tuple[ModuleProgram, ...]:
    """Returns the programs, sorted by module name."""
    return tuple(sorted(programs, key=lambda program: program.module))


def _lowered(
    context: LoweringContext, embedding: BaseModule, tokens: Tensor, saved: list[ModuleProgram]
) -> Lowered:
    if embedding.name in {program.module for program in saved}:
        context.refuse("modules_to_save", f"names {embedding.name}: {EMBEDDING}")
    context.raise_refusals()
    return Lowered(sorted_by_module([ModuleProgram(embedding.name, virtual=tokens), *saved]))
