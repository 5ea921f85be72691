"""Trains the example adapters on the default model with Hugging Face PEFT, on a CPU.

    .venv/bin/python adapters/examples/train.py [NAME ...]

For each adapter: train its weights in fp32 on the bf16 base, or alternately on that and on the
nf4-rounded base; round them to bf16, as they are stored; measure on the held-out questions; and
write adapter_config.json, adapter_model.safetensors and README.md (the card) to the folder of its
name. Seeds are fixed: equal CPUs, thread counts and library versions give equal adapters.
"""

from __future__ import annotations

import argparse
import random
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import bitsandbytes.functional as bnb
import torch
import transformers
from card import Measured, card
from peft import PeftModel, get_peft_model
from tasks import ANSWER_TOKENS, BATCH, SEED, TASKS, Question, Task, read_questions
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoModelForCausalLM, AutoTokenizer

from adaplex.model.base.source import DEFAULT_MODEL, resolve_model

WARM_UP = 8
"""Steps in which the learning rate rises."""
IGNORED = -100
"""Label of tokens without loss."""


class Chat:
    """The default model's tokenizer and chat template."""

    def __init__(self, model: Path) -> None:
        self.tokenizer: Any = AutoTokenizer.from_pretrained(model)

    def prompt(self, question: str) -> list[int]:
        """Returns the token ids up to the beginning of the assistant's answer."""
        turns = [{"role": "user", "content": question}]
        encoded = self.tokenizer.apply_chat_template(
            turns, add_generation_prompt=True, return_dict=True
        )
        ids: list[int] = encoded["input_ids"]
        return ids

    def example(self, question: str, answer: str) -> tuple[Tensor, Tensor]:
        """Returns (input ids, labels), both [tokens]; only the answer and its eos have labels."""
        asked = self.prompt(question)
        said = [*self.tokenizer(answer).input_ids, self.tokenizer.eos_token_id]
        return torch.tensor(asked + said), torch.tensor([IGNORED] * len(asked) + said)

    def batch(self, examples: Sequence[tuple[Tensor, Tensor]]) -> dict[str, Tensor]:
        """Returns input_ids, labels and attention_mask, each [rows, tokens], right-padded."""
        ids = [row for row, _ in examples]
        labels = [row for _, row in examples]
        return {
            "input_ids": pad_sequence(ids, batch_first=True),
            "labels": pad_sequence(labels, batch_first=True, padding_value=IGNORED),
            "attention_mask": pad_sequence([torch.ones_like(row) for row in ids], batch_first=True),
        }


def batches(count: int, steps: int) -> Iterator[list[int]]:
    """Yields the example indices of one batch for each step, without repetition in an epoch."""
    dice, left = random.Random(SEED), list[int]()
    for _ in range(steps):
        if len(left) < BATCH:
            left = dice.sample(range(count), count)
        yield [left.pop() for _ in range(BATCH)]


class TwoBases:
    """The decoder's linears, with stored weights and with the dequantized ones of an nf4 base."""

    def __init__(self, model: nn.Module) -> None:
        self._linears = [
            module
            for name, module in model.named_modules()
            if isinstance(module, nn.Linear) and ".layers." in name and "lora_" not in name
        ]
        self._stored = [linear.weight.data for linear in self._linears]
        self._rounded = [_rounded(weight) for weight in self._stored]

    def use(self, *, nf4: bool) -> None:
        """Sets the weights of all linears to one of the two."""
        for linear, weight in zip(
            self._linears, self._rounded if nf4 else self._stored, strict=True
        ):
            linear.weight.data = weight


def _rounded(weight: Tensor) -> Tensor:
    packed, state = bnb.quantize_4bit(weight, quant_type="nf4")
    rounded: Tensor = bnb.dequantize_4bit(packed, state)
    return rounded


def train(
    model: nn.Module, bases: TwoBases, chat: Chat, task: Task, questions: Sequence[Question]
) -> None:
    """Trains the parameters of `model` that require gradients."""
    examples = [chat.example(question.question, task.answer(question)) for question in questions]
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=task.learning_rate, weight_decay=0.0)
    schedule = transformers.get_linear_schedule_with_warmup(optimizer, WARM_UP, task.steps)
    model.train()
    for step, indices in enumerate(batches(len(examples), task.steps), 1):
        bases.use(nf4=task.both_bases and step % 2 == 0)
        loss = model(**chat.batch([examples[index] for index in indices])).loss
        loss.backward()
        nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if step % 10 == 0:
            print(f"{task.name}: step {step}/{task.steps}, loss {loss.item():.3f}", flush=True)
    bases.use(nf4=False)
    model.eval()


@torch.no_grad()
def measure(model: Any, chat: Chat, task: Task, questions: Sequence[Question]) -> Measured:
    """Returns loss and greedy answers of `model`."""
    total, tokens = 0.0, 0
    for question in questions:
        batch = chat.batch([chat.example(question.question, task.answer(question))])
        labels = int((batch["labels"] != IGNORED).sum())
        total += model(**batch).loss.item() * labels
        tokens += labels
    return Measured(total / tokens, [reply(model, chat, q.question) for q in questions])


@torch.no_grad()
def reply(model: Any, chat: Chat, question: str) -> str:
    """Returns the greedy answer to one question."""
    asked = torch.tensor([chat.prompt(question)])
    said = model.generate(
        input_ids=asked,
        attention_mask=torch.ones_like(asked),
        max_new_tokens=ANSWER_TOKENS,
        do_sample=False,
    )
    text: str = chat.tokenizer.decode(said[0, asked.shape[1] :], skip_special_tokens=True)
    return text.strip()


def save(model: PeftModel, task: Task, folder: Path) -> None:
    """Writes the adapter in bf16, naming the base by its hub id, not by its path."""
    for weight in model.parameters():
        if weight.requires_grad:
            weight.data = weight.data.to(torch.bfloat16)
    model.peft_config["default"].base_model_name_or_path = DEFAULT_MODEL
    model.save_pretrained(str(folder), save_embedding_layers=False)
    # safetensors writes files that only their owner may read
    (folder / "adapter_model.safetensors").chmod(0o644)


def make(task: Task, directory: Path, folder: Path) -> None:
    """Trains, measures and writes one adapter."""
    torch.manual_seed(SEED)
    chat = Chat(directory)
    questions, held_out = read_questions()
    base = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.bfloat16)
    before = measure(base, chat, task, held_out)
    model: Any = get_peft_model(base, task.method)
    bases = TwoBases(model)
    train(model, bases, chat, task, questions)
    for weight in model.parameters():
        if weight.requires_grad:
            weight.data = weight.data.to(torch.bfloat16).float()
    after = measure(model, chat, task, held_out)
    bases.use(nf4=True)
    after_nf4 = measure(model, chat, task, held_out)
    save(model, task, folder)
    (folder / "README.md").write_text(
        card(task, len(questions), held_out, before, after, after_nf4)
    )


def main() -> int:
    """Trains the adapters named on the command line, or all."""
    known = {task.name: task for task in TASKS}
    parser = argparse.ArgumentParser(description="Train the example adapters.")
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(known)}")
    names = parser.parse_args().names or list(known)
    if unknown := set(names) - known.keys():
        parser.error(f"no such adapter: {', '.join(sorted(unknown))}")
    directory = resolve_model(DEFAULT_MODEL)
    for name in names:
        make(known[name], directory, Path(__file__).parent / name)
    return 0


if __name__ == "__main__":
    sys.exit(main())
