"""PEFT's answers for an adapter of each family on tiny models, computed once a session."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from torch import Tensor

from peft_adapters import Oracle, load_plain
from peft_families import FAMILIES, LORAS, NOT_GPT2
from rig import prompt

LENGTH = 37
"""Tokens of the prompt, without an invocation and the two tokens at its end."""
EVERY_FAMILY = {**LORAS, **FAMILIES}
ARCHITECTURES = ("qwen2", "gpt2", "llama")
"""They differ in biases of linears, in names, and in how linears are stored."""


@dataclass(frozen=True)
class PeftCase:
    """An adapter, a prompt, and what PEFT computes with and without the adapter."""

    directory: Path
    tokens: list[int]
    logits: Tensor
    """[vocabulary] after the prompt."""
    idle: Tensor
    """[vocabulary] of the base alone."""
    oracle: Oracle


PeftCaseOf = Callable[[str, str], PeftCase]
"""(family, architecture) -> its case."""


def peft_cases(tiny_model: Callable[[str], Path], folder: Path) -> PeftCaseOf:
    """Returns a function that makes each case once."""

    @cache
    def idle(architecture: str, tokens: tuple[int, ...]) -> Tensor:
        return Oracle(load_plain(tiny_model(architecture)), None).logits(list(tokens))

    @cache
    def case(name: str, architecture: str) -> PeftCase:
        model, family = tiny_model(architecture), EVERY_FAMILY[name]
        directory = family.save(model, folder / f"{name}-{architecture}", 1)
        oracle = family.oracle(model, directory)
        tokens = [*family.prompt(prompt(LENGTH)), 9, 7]
        logits, base = oracle.logits(tokens), idle(architecture, tuple(tokens))
        assert (base - logits).abs().max() > 1e-2, "the adapter does nothing"
        return PeftCase(directory, tokens, logits, base, oracle)

    return case


def architectures_of(names: list[str]) -> list[tuple[str, str]]:
    """Pairs each family with one architecture that PEFT can make it for, in turn, and plain LoRA
    with all.
    """
    pairs = [("lora", architecture) for architecture in ARCHITECTURES]
    for index, name in enumerate(names):
        known = [a for a in ARCHITECTURES if a != "gpt2" or name not in NOT_GPT2]
        pairs.append((name, known[index % len(known)]))
    return list(dict.fromkeys(pairs))
