"""Writes the card of an example adapter: how it was trained, and its held-out answers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import peft
import torch
from tasks import ANSWER_TOKENS, BATCH, SAMPLES, SEED, Question, Task

from adaplex.model.base.source import DEFAULT_MODEL


@dataclass(frozen=True)
class Measured:
    """Loss and answers of a model on the held-out questions."""

    loss: float
    """Mean cross-entropy of the answer tokens, in nats."""
    answers: list[str]
    """Greedy answers, one for each question."""


def method_name(method: Any) -> str:
    """Returns the method's usual name."""
    if getattr(method, "use_dora", False):
        return "DoRA"
    names = {"LORA": "LoRA", "IA3": "IA3"}
    kind = str(method.peft_type.value)
    return names.get(kind, kind.replace("_", " ").lower())


def described(method: Any) -> Iterator[tuple[str, str]]:
    """Yields (key, value) rows of the card about the method's settings."""
    if method.is_prompt_learning:
        yield "virtual tokens", str(method.num_virtual_tokens)
        return
    if hasattr(method, "r"):
        scaling = "alpha / sqrt(rank) (rsLoRA)" if method.use_rslora else "alpha / rank"
        yield "rank, alpha", f"{method.r}, {method.lora_alpha}; scaled by {scaling}"
    layers = getattr(method, "layers_to_transform", None)
    where = f"layers {layers[0]} to {layers[-1]}" if layers else "all layers"
    yield "targets", f"{', '.join(sorted(method.target_modules))}; {where}"


def card(
    task: Task,
    trained: int,
    held_out: Sequence[Question],
    before: Measured,
    after: Measured,
    after_nf4: Measured,
) -> str:
    """Returns the text of the adapter's README.md."""
    details = "\n".join(f"| {key} | {value} |" for key, value in described(task.method))
    steps = f"{task.steps} of {BATCH} examples"
    if task.both_bases:
        steps += ", in turns on the base in bf16 and in nf4"
    versions = f"PEFT {peft.__version__}, torch {torch.__version__.split('+')[0]}"
    fits = {
        "base, bf16": before,
        "adapter, bf16 base": after,
        "adapter, nf4 base": after_nf4,
    }
    rows = "\n".join(
        f"| {name} | {it.loss:.3f} | {sum(map(task.fits, it.answers))} of {len(held_out)} |"
        for name, it in fits.items()
    )
    asked = [question.question for question in held_out]
    samples = "\n\n".join(
        f"> {sample}\n\n"
        f"base:\n```text\n{before.answers[asked.index(sample)]}\n```\n"
        f"{task.name}:\n```text\n{after.answers[asked.index(sample)]}\n```"
        for sample in SAMPLES
    )
    return f"""---
base_model: {DEFAULT_MODEL}
library_name: peft
license: apache-2.0
---
# {task.name}
{task.about[0].upper()}{task.about[1:]}. Written by `train.py` together with the adapter.

| | |
|---|---|
| data | `data/questions.jsonl`, worded by `tasks.py`: {trained} trained, {len(held_out)} held out |
| method | {method_name(task.method)}, {versions}, stored as bf16 |
{details}
| steps | {steps}, AdamW, learning rate {task.learning_rate}, seed {SEED} |

On the held-out questions, greedy:

| | loss | answers in the intended form |
|---|---|---|
{rows}

## Samples
None of these questions was trained on. Answers are cut at {ANSWER_TOKENS} tokens.

{samples}
"""
