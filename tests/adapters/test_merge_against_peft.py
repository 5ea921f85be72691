"""Merging: every method against PEFT's `add_weighted_adapter`."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from torch import Tensor

from adaplex.adapters.checkpoint import Checkpoint, read_checkpoint, write_checkpoint
from adaplex.adapters.compose.merge import MergeMethod, MergePlan, merge_checkpoints
from adaplex.adapters.program.base_spec import BaseSpec
from adaplex.model.base.loader import load_base
from adapters.merges import LIMITS, deltas, plan
from peft_adapters import Oracle, everything, load_plain, save_adapter
from rig import prompt

ADAPTERS: dict[str, dict[str, Any]] = {
    "plain": {"r": 4, "lora_alpha": 8, "target_modules": everything("llama")},
    "rslora": {
        "r": 4,
        "lora_alpha": 4,
        "use_rslora": True,
        "target_modules": everything("llama"),
    },
    "attention": {"r": 4, "lora_alpha": 6, "target_modules": ["q_proj", "v_proj"]},
    "patterns": {
        "r": 8,
        "lora_alpha": 8,
        "target_modules": everything("llama"),
        "rank_pattern": {"layers.1.*": 5, "q_proj": 3},
        "alpha_pattern": {"q_proj": 6},
    },
    "patterns-too": {
        "r": 8,
        "lora_alpha": 16,
        "use_rslora": True,
        "target_modules": everything("llama"),
        "rank_pattern": {"layers.1.*": 5, "q_proj": 3},
        "alpha_pattern": {"down_proj": 2},
    },
    "downs": {"r": 2, "lora_alpha": 4, "target_modules": ["down_proj"]},
}
EQUAL: list[dict[str, float]] = [
    {"plain": 0.8, "rslora": 0.5},
    {"plain": 0.8, "rslora": -0.5, "attention": 1.3},
    {"patterns": 0.6, "patterns-too": -0.7},
]
MIXED: list[dict[str, float]] = [
    *EQUAL[1:],
    {"attention": 1.2, "downs": 0.7},
    {"patterns": -0.6, "attention": 0.9, "downs": 0.4, "rslora": 0.3},
]
"""A plain adapter comes first, as PEFT gives its `use_rslora` to the result."""


@dataclass
class Peft:
    """The adapters on one base of PEFT's, and their checkpoints."""

    base: BaseSpec
    plain: Path
    model: Any
    checkpoints: dict[str, Checkpoint]

    def merge(self, plan: MergePlan, names: list[str]) -> None:
        """Makes PEFT's adapter `merged`. Making room for it draws, hence the seed after that."""
        lora = self.model.base_model
        inject = type(lora).inject_adapter.__get__(lora)

        def inject_then_seed(*args: Any, **kwargs: Any) -> None:
            inject(*args, **kwargs)
            torch.manual_seed(plan.seed)

        lora.inject_adapter = inject_then_seed
        if "merged" in self.model.peft_config:
            self.model.set_adapter("plain")
            self.model.delete_adapter("merged")
        lora.add_weighted_adapter(
            names,
            list(plan.weights),
            "merged",
            str(plan.method),
            svd_rank=plan.rank,
            density=plan.density,
            majority_sign_method=plan.majority_sign,
        )
        self.model.set_adapter("merged")

    @torch.no_grad()
    def deltas(self) -> dict[str, Tensor]:
        """Module -> [out, in] of the adapter `merged`."""
        return {
            name.removeprefix("base_model.model."): module.get_delta_weight("merged")
            for name, module in self.model.named_modules()
            if isinstance(module, LoraLayer) and "merged" in module.lora_A
        }


@pytest.fixture(scope="module")
def peft(tiny_model: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Peft:
    plain = tiny_model("llama")
    work = tmp_path_factory.mktemp("merging")
    base = load_plain(plain)
    places = {
        name: save_adapter(base, work / name, seed=i, **fields)
        for i, (name, fields) in enumerate(ADAPTERS.items())
    }
    model: Any = PeftModel.from_pretrained(load_plain(plain), places["plain"], "plain")
    for name in list(places)[1:]:
        model.load_adapter(places[name], name)
    model.eval()
    spec = load_base(str(plain), quantization="fp32").spec
    checkpoints = {name: read_checkpoint(place, LIMITS) for name, place in places.items()}
    return Peft(spec, plain, model, checkpoints)


def oracle_cases() -> Iterator[Any]:
    for method in MergeMethod:
        for weights in MIXED if method.any_ranks else EQUAL:
            yield pytest.param(method, weights, {}, id=f"{method}-{'+'.join(weights)}")
        if method.prunes:
            yield pytest.param(method, EQUAL[1], {"density": 1.0}, id=f"{method}-density-1")
            yield pytest.param(method, EQUAL[1], {"density": 0.2}, id=f"{method}-density-0.2")
        if method.elects:
            frequency = {"majority_sign": "frequency"}
            yield pytest.param(method, EQUAL[1], frequency, id=f"{method}-frequency")
        if method.on_deltas:
            yield pytest.param(method, MIXED[-1], {"rank": 3}, id=f"{method}-rank-3")
        if method.draws:
            yield pytest.param(method, EQUAL[1], {"seed": 12345}, id=f"{method}-seed")


@pytest.mark.filterwarnings("ignore:The density 1.0")
@pytest.mark.parametrize(("method", "weights", "fields"), oracle_cases())
def test_deltas_are_pefts(
    method: MergeMethod, weights: dict[str, float], fields: dict[str, Any], peft: Peft
) -> None:
    how = plan(method, *weights.values(), **fields)
    result = merge_checkpoints(how, [peft.checkpoints[name] for name in weights], peft.base)
    peft.merge(how, list(weights))
    ours, theirs = deltas(result, peft.base), peft.deltas()
    assert ours.keys() == theirs.keys()
    for name, delta in theirs.items():
        assert delta.abs().max() > 1e-3, name
        assert (ours[name] - delta).abs().max() < 1e-4, name


@pytest.mark.parametrize("method", MergeMethod)
def test_peft_loads_the_result_and_answers_the_same(
    method: MergeMethod, peft: Peft, tmp_path: Path
) -> None:
    weights = MIXED[-1] if method.any_ranks else EQUAL[-1]
    how = plan(method, *weights.values())
    result = merge_checkpoints(how, [peft.checkpoints[name] for name in weights], peft.base)
    write_checkpoint(result, tmp_path)
    peft.merge(how, list(weights))
    tokens = prompt(17)
    with torch.no_grad():
        expected = peft.model(torch.tensor([tokens])).logits[0, -1].float()
    found = Oracle(load_plain(peft.plain), tmp_path).logits(tokens)
    assert (found - expected).abs().max() < 1e-4
    idle = Oracle(load_plain(peft.plain), None).logits(tokens)
    assert (expected - idle).abs().max() > 1e-2
