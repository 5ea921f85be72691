"""Random adapters of many families on the default model, against HF PEFT."""

from __future__ import annotations

from pathlib import Path

import pytest

from adaplex.model.source import resolve_model
from peft_families import FAMILIES, LORAS
from rig import Rig, lowered

ALL = {**LORAS, **FAMILIES}
NAMES = (
    *("lora-whole", "dora", "alora", "qalora", "adalora", "vera", "loha", "lokr", "ia3"),
    *("ln-tuning", "bitfit", "multitask-prompt-tuning", "prefix-tuning"),
)
STEPS = 4


@pytest.fixture(scope="module")
def model() -> Path:
    return resolve_model("smollm2-135m-instruct", progress=lambda _: None)


@pytest.fixture(scope="module")
def rig(model: Path) -> Rig:
    return Rig(model, "fp32", arena_bytes=1 << 30)


@pytest.mark.parametrize("name", NAMES)
def test_logits_and_tokens_are_pefts(name: str, model: Path, rig: Rig, tmp_path: Path) -> None:
    family = ALL[name]
    question = [{"role": "user", "content": "What is the capital of France?"}]
    tokens = family.prompt(
        rig.base.tokenizer.apply_chat_template(
            question, add_generation_prompt=True, return_dict=False
        )
    )
    plain = rig.prefill(rig.sequence(tokens))[0]
    directory = family.save(model, tmp_path / name, 3)
    ref, oracle = rig.add(lowered(directory, rig.base.spec)), family.oracle(model, directory)
    expected, got = oracle.logits(tokens), rig.prefill(rig.sequence(tokens, ref))[0]
    assert (got - expected).abs().max() < 1e-4 * expected.abs().max()
    assert (plain - expected).abs().max() > 1
    (output,) = rig.generate([rig.sequence(tokens, ref)], STEPS)
    assert output == oracle.greedy(tokens, STEPS)
