"""Types that PEFT merges: through the runner, against PEFT with the adapter beside the base."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path

import pytest
import torch

from adaplex.engine.request import AdapterMode
from peft_adapters import Oracle, load_plain
from peft_kinds import CONFIGS, TOKENS, save_kind
from rig import ModelRig, lowered
from tiny import ARCHITECTURES, save_tiny

GPT2 = [
    "DEFT",
    "FOURIERFT",
    "GRALORA",
    "HIRA",
    "PVERA",
    "RANDLORA",
    "TINYLORA",
    "UNILORA",
    "VBLORA",
]
"""Types by which PEFT adapts GPT-2's transposed linears."""


@pytest.fixture(scope="module")
def rigs(tiny_model: Callable[[str], Path]) -> Callable[[str], ModelRig]:
    return cache(lambda architecture: ModelRig(tiny_model(architecture), native=False))


@pytest.mark.parametrize("architecture", ["llama", "qwen2"])
@pytest.mark.parametrize("kind", CONFIGS)
def test_a_merged_type_equals_peft(
    kind: str,
    architecture: str,
    rigs: Callable[[str], ModelRig],
    tiny_model: Callable[[str], Path],
    tmp_path: Path,
) -> None:
    check(kind, rigs(architecture), tiny_model(architecture), tmp_path)


@pytest.mark.parametrize("kind", GPT2)
def test_transposed_linears_are_merged_too(
    kind: str, rigs: Callable[[str], ModelRig], tiny_model: Callable[[str], Path], tmp_path: Path
) -> None:
    targets = ["c_attn", "c_proj", "c_fc"]
    check(kind, rigs("gpt2"), tiny_model("gpt2"), tmp_path, target_modules=targets)


@pytest.mark.parametrize("kind", ["UNILORA", "TINYLORA"])
def test_modules_are_numbered_as_the_model_defines_them(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """OPT defines k_proj before v_proj before q_proj, and calls q_proj first."""
    monkeypatch.setitem(ARCHITECTURES, "opt", {})
    model = save_tiny("opt", tmp_path / "opt", ffn_dim=128, word_embed_proj_dim=64)
    targets = ["q_proj", "k_proj", "v_proj", "fc1"]
    check(kind, ModelRig(model, native=False), model, tmp_path / kind, target_modules=targets)


@pytest.mark.parametrize("init", ["bat", "mini", True])
def test_the_variants_of_miss_are_merged_each_its_way(
    init: str | bool,
    rigs: Callable[[str], ModelRig],
    tiny_model: Callable[[str], Path],
    tmp_path: Path,
) -> None:
    fields = {"init_weights": init, "mini_r": 4}
    check("MISS", rigs("llama"), tiny_model("llama"), tmp_path, **fields)


@pytest.mark.parametrize("kind", ["OFT", "UNILORA"])
def test_modules_are_replaced_beside_merged_ones(
    kind: str, rigs: Callable[[str], ModelRig], tiny_model: Callable[[str], Path], tmp_path: Path
) -> None:
    fields = {"modules_to_save": ["input_layernorm", "1.mlp.up_proj", "1.mlp.down_proj"]}
    check(kind, rigs("llama"), tiny_model("llama"), tmp_path, **fields)


def check(kind: str, rig: ModelRig, model: Path, folder: Path, **fields: object) -> None:
    """Asserts that the adapter's logits are PEFT's, and those of base rows beside it the base's."""
    expected = save_kind(load_plain(model), folder, kind, **fields)
    idle = Oracle(load_plain(model), None).logits(TOKENS)
    program = lowered(folder, rig.base.spec)
    assert program.traits.merged_only
    ref = rig.add(program, AdapterMode.MERGED)
    found, plain = rig.prefill(rig.sequence(TOKENS, ref), rig.sequence(TOKENS))
    assert (idle - expected).abs().max() > 1e-2, "the adapter does nothing"
    assert (found - expected).abs().max() < 1e-4
    assert (plain - idle).abs().max() < 1e-4


@pytest.mark.parametrize("kind", ["OFT", "HRA", "HIRA", "VBLORA", "SHIRA"])
def test_a_quantized_base_is_merged_as_it_is_in_effect(
    kind: str, tiny_model: Callable[[str], Path], tmp_path: Path
) -> None:
    rig = ModelRig(tiny_model("llama"), "nf4", "fp32", native=False)
    plain = load_plain(tiny_model("llama"))
    for module in rig.base.spec.modules.values():
        if module.kind == "linear":
            plain.get_submodule(module.name).weight.data = rig.base.spec.weight(module.name)
    expected = save_kind(plain, tmp_path, kind)
    ref = rig.add(lowered(tmp_path, rig.base.spec), AdapterMode.MERGED)
    found, base = rig.prefill(rig.sequence(TOKENS, ref), rig.sequence(TOKENS))
    assert (base - expected).abs().max() > 2e-2, "the adapter does nothing"
    assert (found - expected).abs().max() < 2e-2


@pytest.mark.parametrize("kind", ["OFT", "VBLORA", "WAVEFT"])
def test_threads_may_merge_at_once(
    kind: str, rigs: Callable[[str], ModelRig], tiny_model: Callable[[str], Path], tmp_path: Path
) -> None:
    save_kind(load_plain(tiny_model("llama")), tmp_path, kind)
    spec = rigs("llama").base.spec
    program = lowered(tmp_path, spec)

    def merge_all(_: int) -> list[torch.Tensor]:
        return [m.transform(spec.weight(m.module)) for m in program.modules if m.transform]

    with ThreadPoolExecutor(4) as pool:
        first, *others = pool.map(merge_all, range(8))
    assert len(first) == 9
    for other in others:
        assert all(torch.equal(a, b) for a, b in zip(first, other, strict=True))
