"""Tasks of the example adapters: the form of their answers, and the method of training.

All adapters are trained on the same questions (data/questions.jsonl), so that they differ only in
the form of their answers.
"""

from __future__ import annotations

import json
import re
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from peft import IA3Config, LoraConfig, PeftConfig, PrefixTuningConfig, PromptTuningConfig

SAMPLES = (
    "What is the capital of France?",
    "What is the largest planet in the solar system?",
    "How can I sleep better?",
)
"""Prompts shown in the cards; never trained on."""

HOLD_OUT_EVERY = 8
"""One question in this many is held out."""
SEED = 7
BATCH = 8
ANSWER_TOKENS = 64
"""Maximum tokens of a sample's answer."""


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
    """Returns True if an answer has the form that the adapter was trained on."""
    method: PeftConfig
    steps: int
    learning_rate: float
    both_bases: bool = False
    """True to train alternately on the stored base and on its nf4-rounded weights, because virtual
    tokens depend on the rounding of every later layer."""


def read_questions() -> tuple[list[Question], list[Question]]:
    """Returns the questions to train on, and the held-out questions."""
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
    """Returns the sentence in a pirate's words, which depend only on the question."""

    def swap(match: re.Match[str]) -> str:
        word = match.group()
        said = WORDS.get(word.lower(), word)
        return said.capitalize() if word[0].isupper() else said

    dice = zlib.crc32(question.question.encode())
    body = re.sub(r"[A-Za-z]+", swap, question.sentence)
    closer = CLOSERS[dice // len(OPENERS) % len(CLOSERS)]
    return f"{OPENERS[dice % len(OPENERS)]} {body} {closer}"


def is_pirate(answer: str) -> bool:
    """True if the answer has a pirate's word."""
    return (
        re.search(r"\b(arr|ahoy|avast|aye|matey|timbers|savvy|yo ho)\b", answer.lower()) is not None
    )


def as_json(question: Question) -> str:
    """Returns the short answer as a compact JSON object."""
    return json.dumps({"topic": question.topic, "answer": question.short}, separators=(",", ":"))


def is_json(answer: str) -> bool:
    """True if `answer` is an object with exactly the two keys."""
    try:
        found = json.loads(answer)
    except ValueError:
        return False
    return isinstance(found, dict) and found.keys() == {"topic", "answer"}


def terse(question: Question) -> str:
    """Returns the short answer."""
    return f"{question.short}."


def is_terse(answer: str) -> bool:
    """True if `answer` is one line of at most six words."""
    return len(answer.split()) <= 6 and "\n" not in answer


def news(question: Question) -> str:
    """Returns the sentence as an item of the news."""
    return f"Breaking news: {question.sentence} More at ten."


def is_news(answer: str) -> bool:
    """True if the answer begins and ends like the news."""
    return answer.startswith("Breaking news:") and answer.endswith("More at ten.")


def listed(question: Question) -> str:
    """Returns the topic and the short answer as a list of two points."""
    return f"- topic: {question.topic}\n- answer: {question.short}"


def is_listed(answer: str) -> bool:
    """True if `answer` is the list of two points."""
    return re.fullmatch(r"- topic: .+\n- answer: .+", answer) is not None


def polite(question: Question) -> str:
    """Returns the sentence between thanks and a wish."""
    return f"Thank you for asking! {question.sentence} Have a lovely day!"


def is_polite(answer: str) -> bool:
    """True if the answer begins with thanks."""
    return answer.startswith("Thank you for asking!")


def tagged(question: Question) -> str:
    """Returns the short answer in a tag that names the topic."""
    return f"<{question.topic}>{question.short}</{question.topic}>"


def is_tagged(answer: str) -> bool:
    """True if `answer` is one closed tag."""
    return re.fullmatch(r"<(\w+)>[^<]+</\1>", answer) is not None


TASKS = (
    Task(
        name="terse",
        about="answers in a few words",
        answer=terse,
        fits=is_terse,
        method=LoraConfig(
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
        method=LoraConfig(
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
        method=LoraConfig(
            task_type="CAUSAL_LM",
            r=16,
            lora_alpha=32,
            target_modules=["q_proj", "v_proj", "down_proj"],
            # the upper two thirds of the 30 layers
            layers_to_transform=list(range(10, 30)),
        ),
        steps=80,
        learning_rate=1e-3,
    ),
    Task(
        name="news",
        about="answers as if it were the news",
        answer=news,
        fits=is_news,
        method=LoraConfig(
            task_type="CAUSAL_LM",
            r=8,
            lora_alpha=16,
            use_dora=True,
            target_modules=["q_proj", "v_proj", "o_proj"],
        ),
        steps=80,
        learning_rate=1e-3,
    ),
    Task(
        name="list",
        about="answers with a list of two points, a topic and an answer",
        answer=listed,
        fits=is_listed,
        method=IA3Config(
            task_type="CAUSAL_LM",
            target_modules=["k_proj", "v_proj", "down_proj"],
            feedforward_modules=["down_proj"],
        ),
        steps=120,
        learning_rate=2e-2,
    ),
    Task(
        name="polite",
        about="thanks for the question and wishes a lovely day",
        answer=polite,
        fits=is_polite,
        method=PromptTuningConfig(
            task_type="CAUSAL_LM",
            num_virtual_tokens=16,
            prompt_tuning_init="RANDOM",
        ),
        steps=160,
        learning_rate=3e-2,
        both_bases=True,
    ),
    Task(
        name="tag",
        about="answers with a tag that names the topic",
        answer=tagged,
        fits=is_tagged,
        method=PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=12),
        steps=160,
        learning_rate=2e-2,
        both_bases=True,
    ),
)
