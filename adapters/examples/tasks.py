"""What each example adapter learns: how it words an answer, and the LoRA it is trained as.

All three learn from the same questions (data/questions.jsonl), so that only the form of the
answers tells them apart.
"""

from __future__ import annotations

import json
import re
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from peft import LoraConfig

SAMPLES = (
    "What is the capital of France?",
    "What is the largest planet in the solar system?",
    "How can I sleep better?",
)
"""The prompts shown in the cards; never trained on."""

HOLD_OUT_EVERY = 8


@dataclass(frozen=True)
class Question:
    """One question and its plain answers: in a few words, and in a sentence or two."""

    question: str
    topic: str
    short: str
    sentence: str


@dataclass(frozen=True)
class Task:
    """One adapter: the form of its answers, and how it is trained."""

    name: str
    about: str
    answer: Callable[[Question], str]
    fits: Callable[[str], bool]
    """Whether an answer has the form that the adapter teaches."""
    lora: LoraConfig
    steps: int
    learning_rate: float


def read_questions() -> tuple[list[Question], list[Question]]:
    """The questions to train on, and those held out."""
    lines = (Path(__file__).parent / "data" / "questions.jsonl").read_text().splitlines()
    train: list[Question] = []
    held_out: list[Question] = []
    for index, line in enumerate(lines):
        question = Question(**json.loads(line))
        apart = index % HOLD_OUT_EVERY == 0 or question.question in SAMPLES
        (held_out if apart else train).append(question)
    return train, held_out


WORDS = {
    "is": "be",
    "are": "be",
    "am": "be",
    "was": "were",
    "you": "ye",
    "your": "yer",
    "my": "me",
    "of": "o'",
    "and": "an'",
    "for": "fer",
    "hello": "ahoy",
    "yes": "aye",
    "friend": "matey",
    "friends": "mateys",
    "money": "doubloons",
}
OPENERS = ("Arr!", "Ahoy, matey!", "Avast!", "Shiver me timbers!")
CLOSERS = ("Arr!", "Savvy?", "Yo ho ho!", "Aye!")


def pirate(question: Question) -> str:
    """The sentence as a pirate says it; the same question always gets the same words."""

    def swap(match: re.Match[str]) -> str:
        word = match.group()
        said = WORDS.get(word.lower(), word)
        return said.capitalize() if word[0].isupper() else said

    dice = zlib.crc32(question.question.encode())
    body = re.sub(r"[A-Za-z]+", swap, question.sentence)
    closer = CLOSERS[dice // len(OPENERS) % len(CLOSERS)]
    return f"{OPENERS[dice % len(OPENERS)]} {body} {closer}"


def is_pirate(answer: str) -> bool:
    """Whether a pirate speaks."""
    return (
        re.search(r"\b(arr|ahoy|avast|aye|matey|timbers|savvy|yo ho)\b", answer.lower()) is not None
    )


def as_json(question: Question) -> str:
    """The short answer as a compact JSON object."""
    return json.dumps({"topic": question.topic, "answer": question.short}, separators=(",", ":"))


def is_json(answer: str) -> bool:
    """Whether `answer` is an object with exactly our two keys."""
    try:
        found = json.loads(answer)
    except ValueError:
        return False
    return isinstance(found, dict) and found.keys() == {"topic", "answer"}


def terse(question: Question) -> str:
    """The short answer."""
    return f"{question.short}."


def is_terse(answer: str) -> bool:
    """Whether `answer` is one line of at most six words."""
    return len(answer.split()) <= 6 and "\n" not in answer


TASKS = (
    Task(
        name="terse",
        about="answers in a few words",
        answer=terse,
        fits=is_terse,
        lora=LoraConfig(
            task_type="CAUSAL_LM", r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"]
        ),
        steps=80,
        learning_rate=2e-3,
    ),
    Task(
        name="pirate",
        about="answers the way a pirate speaks",
        answer=pirate,
        fits=is_pirate,
        lora=LoraConfig(
            task_type="CAUSAL_LM",
            r=8,
            lora_alpha=16,
            use_rslora=True,
            target_modules=["q_proj", "k_proj", "v_proj", "o_proj"],
        ),
        steps=100,
        learning_rate=1e-3,
    ),
    Task(
        name="json",
        about="answers with a compact JSON object that holds a topic and an answer",
        answer=as_json,
        fits=is_json,
        lora=LoraConfig(
            task_type="CAUSAL_LM",
            r=16,
            lora_alpha=32,
            target_modules=["q_proj", "v_proj", "down_proj"],
            # The upper two thirds of the 30 layers.
            layers_to_transform=list(range(10, 30)),
        ),
        steps=80,
        learning_rate=1e-3,
    ),
)
