"""Adapters that AdapterHub's library wrote, against the logits that it gave for them.

tests/adapterhub/make_fixtures.py wrote both; the library's environment is not needed here.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from adaplex.engine.batch import Chunk
from adaplex.engine.request import AdapterRef
from rig import Rig, lowered
from tiny import byte_tokenizer

FIXTURES = Path(__file__).parent.parent / "adapterhub" / "fixtures"
CASES = [
    pytest.param(folder.parent.name, folder.name, id=f"{folder.parent.name}-{folder.name}")
    for folder in sorted(FIXTURES.glob("*/*"))
    if (folder / "adapter_config.json").exists()
]
PREFILLED = 19
"""Tokens of the prompt; the others are decoded."""


@cache
def said(architecture: str) -> dict[str, Tensor]:
    """The library's logits [tokens, vocabulary] by adapter, and the tokens."""
    return load_file(FIXTURES / architecture / "logits.safetensors")


@pytest.fixture(scope="module")
def rigs(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, bool], Rig]:
    """(architecture, native) -> the base of the fixtures, loaded once."""

    @cache
    def rig(architecture: str, native: bool) -> Rig:
        model = tmp_path_factory.mktemp(architecture) / "model"
        shutil.copytree(FIXTURES / architecture / "model", model)
        byte_tokenizer().save_pretrained(model)
        return Rig(model, native=native)

    return rig


def logits(rig: Rig, tokens: list[int], ref: AdapterRef | None) -> Tensor:
    """[decoded + 1, vocabulary]: after the prompt, and after each further token."""
    sequence = rig.sequence(tokens[:PREFILLED], ref)
    rows = [rig.prefill(sequence)[0]]
    for token in tokens[PREFILLED:]:
        sequence.tokens.append(token)
        rows.append(rig.forward(Chunk(sequence, len(sequence) - 1, 1))[0])
    return torch.stack(rows)


@pytest.mark.parametrize("native", [True, False], ids=["native", "reference"])
@pytest.mark.parametrize(("architecture", "name"), CASES)
def test_prefill_and_decode_equal_the_library(
    architecture: str, name: str, native: bool, rigs: Callable[[str, bool], Rig]
) -> None:
    rig = rigs(architecture, native)
    tokens = said(architecture)["tokens"].tolist()
    expected = said(architecture)[name][PREFILLED - 1 :]
    idle = said(architecture)["base"][PREFILLED - 1 :]
    program = lowered(FIXTURES / architecture / name, rig.base.spec)
    assert (expected - idle).abs().max() > 0.1, "the adapter changes nothing"
    assert (logits(rig, tokens, rig.add(program)) - expected).abs().max() < 1e-4
    assert (logits(rig, tokens, None) - idle).abs().max() < 1e-4
