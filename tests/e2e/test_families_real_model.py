"""Six families on the default model, one for each of their primitives, against HF PEFT.

The others run on tiny models: tests/model/oracle.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
from safetensors.torch import load_file
from torch import Tensor

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
SIX = ("lora", "dora", "ia3", "bitfit", "prompt-tuning", "prefix-tuning")
"""Low-rank deltas, output scales, input scales, biases, virtual tokens and KV prefixes."""
SERVED = {name: ({**LORAS, **FAMILIES})[name] for name in SIX}

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def model() -> Path:
    return resolve_model("smollm2-135m-instruct", progress=lambda _: None)


@pytest.fixture(scope="module")
def served(model: Path) -> ModelRig:
    return ModelRig(model, "fp32", num_blocks=512, arena_bytes=1 << 30)


@pytest.fixture(scope="module")
def idle(model: Path) -> Callable[[list[int]], Tensor]:
    """Tokens -> the base's logits [vocabulary] after them, computed once for each prompt."""
    oracle = Oracle(load_plain(model), None)
    known = cache(lambda tokens: oracle.logits(list(tokens)))
    return lambda tokens: known(tuple(tokens))


@pytest.mark.parametrize("name", SERVED)
def test_prefill_and_decode_equal_peft(
    name: str,
    model: Path,
    served: ModelRig,
    idle: Callable[[list[int]], Tensor],
    tmp_path: Path,
) -> None:
    family = SERVED[name]
    tokens = family.prompt(prompt(24))
    directory = family.save(model, tmp_path / name, 1)
    oracle = family.oracle(model, directory)
    expected, greedy = oracle.logits(tokens), oracle.greedy(tokens, STEPS)
    ref = served.add(lowered(directory, served.base.spec))
    got = served.prefill(served.sequence(tokens, ref))[0]
    assert (got - expected).abs().max() < 1e-4 * expected.abs().max()
    base = idle(tokens)
    assert (base - expected).abs().max() > 1e-2 * base.abs().max(), "the adapter does nothing"
    assert served.generate([served.sequence(tokens, ref)], STEPS) == [greedy]
    served.runner.remove_adapter(ref.digest)


def test_a_merged_adapter_equals_peft_unmerged(
    model: Path, served: ModelRig, idle: Callable[[list[int]], Tensor], tmp_path: Path
) -> None:
    kind = "OFT"
    expected = save_kind(load_plain(model), tmp_path / kind, kind, size=0.1)
    ref = served.add(lowered(tmp_path / kind, served.base.spec), AdapterMode.MERGED)
    got = served.prefill(served.sequence(TOKENS, ref))[0]
    assert (got - expected).abs().max() < 1e-4 * expected.abs().max()
    base = idle(TOKENS)
    assert (base - expected).abs().max() > 1e-3 * base.abs().max(), "the adapter does nothing"
    served.runner.remove_merged(ref.digest)


@pytest.mark.parametrize("name", ["houlsby", "parallel"])
def test_bottlenecks_equal_adapterhub(name: str, served: ModelRig) -> None:
    """tests/adapterhub/make_fixtures.py saved the logits of AdapterHub's library."""
    saved = load_file(HUB / "logits.safetensors")
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
