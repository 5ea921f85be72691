"""An adapter of every family on the default model, against HF PEFT: prefill and decoding."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import pytest
from safetensors.torch import load_file

from adaplex.engine.request import AdapterMode
from adaplex.model.base.source import resolve_model
from peft_adapters import Oracle, load_plain
from peft_families import FAMILIES, LORAS
from peft_kinds import TOKENS, save_kind
from rig import ModelRig, lowered, prompt

STEPS = 4
HUB = Path(__file__).parents[1] / "adapterhub" / "fixtures" / "smollm2-135m-instruct"
KEPT = slice(None, None, 96)
"""Tokens whose logits AdapterHub's fixtures have."""
MERGED = ("OFT", "HRA", "FOURIERFT", "VBLORA", "RANDLORA", "C3A")
ALL = {**LORAS, **FAMILIES}


@pytest.fixture(scope="module")
def model() -> Path:
    return resolve_model("smollm2-135m-instruct", progress=lambda _: None)


@cache
def rig(model: Path) -> ModelRig:
    return ModelRig(model, "fp32", num_blocks=512, arena_bytes=2 << 30)


@cache
def idle(model: Path, tokens: tuple[int, ...]) -> list[float]:
    logits: list[float] = Oracle(load_plain(model), None).logits(list(tokens)).tolist()
    return logits


@pytest.mark.parametrize("name", ALL)
def test_prefill_and_decode_equal_peft(name: str, model: Path, tmp_path: Path) -> None:
    family, served = ALL[name], rig(model)
    tokens = family.prompt(prompt(24))
    directory = family.save(model, tmp_path / name, 1)
    oracle = family.oracle(model, directory)
    expected, greedy = oracle.logits(tokens), oracle.greedy(tokens, STEPS)
    ref = served.add(lowered(directory, served.base.spec))
    got = served.prefill(served.sequence(tokens, ref))[0]
    assert (got - expected).abs().max() < 1e-4 * expected.abs().max()
    base = got.new_tensor(idle(model, tuple(tokens)))
    assert (base - expected).abs().max() > 1e-2 * base.abs().max(), "the adapter does nothing"
    assert served.generate([served.sequence(tokens, ref)], STEPS) == [greedy]
    served.runner.remove_adapter(ref.digest)


@pytest.mark.parametrize("kind", MERGED)
def test_merged_adapters_equal_peft_unmerged(kind: str, model: Path, tmp_path: Path) -> None:
    served = rig(model)
    expected = save_kind(load_plain(model), tmp_path / kind, kind, size=0.1)
    ref = served.add(lowered(tmp_path / kind, served.base.spec), AdapterMode.MERGED)
    got = served.prefill(served.sequence(TOKENS, ref))[0]
    assert (got - expected).abs().max() < 1e-4 * expected.abs().max()
    base = got.new_tensor(idle(model, tuple(TOKENS)))
    assert (base - expected).abs().max() > 1e-3 * base.abs().max(), "the adapter does nothing"
    served.runner.remove_merged(ref.digest)


@pytest.mark.parametrize("name", ["houlsby", "pfeiffer", "parallel"])
def test_bottlenecks_equal_adapterhub(name: str, model: Path) -> None:
    """tests/adapterhub/make_fixtures.py saved the logits of AdapterHub's library."""
    served, saved = rig(model), load_file(HUB / "logits.safetensors")
    tokens, expected = saved["tokens"].tolist(), saved[name]
    ref = served.add(lowered(HUB / name, served.base.spec))
    alone, base = served.prefill(served.sequence(tokens, ref), served.sequence(tokens))
    assert (base[KEPT] - saved["base"]).abs().max() < 1e-4 * saved["base"].abs().max()
    assert (alone[KEPT] - expected).abs().max() < 1e-4 * expected.abs().max()
    sequence = served.sequence(tokens[:-1], ref)
    served.prefill(sequence)
    sequence.tokens.append(tokens[-1])
    decoded = served.decode(sequence)[0]
    assert (decoded[KEPT] - expected).abs().max() < 1e-4 * expected.abs().max()
    served.runner.remove_adapter(ref.digest)
