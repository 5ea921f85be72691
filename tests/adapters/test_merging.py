"""Merging: plans, refusals, and every method against PEFT's `add_weighted_adapter`."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from torch import Tensor

from adaplex.adapters import formats
from adaplex.adapters.base_spec import BaseModule, BaseSpec
from adaplex.adapters.checkpoint import Checkpoint, read_checkpoint, write_checkpoint
from adaplex.adapters.errors import AdapterInvalid
from adaplex.adapters.limits import AdapterLimits
from adaplex.adapters.merging import (
    MAX_SOURCES,
    MergeMethod,
    MergePlan,
    merge_adapters,
    merge_checkpoints,
)
from adaplex.adapters.program import AdapterProgram
from adaplex.adapters.registry import AdapterRegistry
from adaplex.model.loader import load_base
from adapters.handmade import (
    BASE,
    DOWN,
    HEAD,
    HIDDEN,
    QUERY,
    UPLOAD,
    VALUE,
    checkpoint,
    make_importer,
    pair,
    push,
    tensors,
)
from peft_adapters import Oracle, everything, load_plain, save_adapter
from rig import prompt

LIMITS = AdapterLimits()
PRUNING = [method for method in MergeMethod if method.prunes]
DRAWING = [method for method in MergeMethod if method.draws]
SVD = [method for method in MergeMethod if method.on_deltas]
EQUAL_RANKS = [method for method in MergeMethod if not method.any_ranks]


def plan(method: MergeMethod, *weights: float, **fields: Any) -> MergePlan:
    density = 0.5 if method.prunes else None
    return MergePlan(method, weights or (0.7, -0.4), **({"density": density} | fields))


def merged(plan: MergePlan, *sources: Checkpoint, base: BaseSpec = BASE) -> Checkpoint:
    return merge_checkpoints(plan, sources or (source(0), source(1)), base)


def source(seed: int, *suffixes: str, rank: int = 2, **fields: Any) -> Checkpoint:
    fields = {"r": rank, "target_modules": list(suffixes) or ["q_proj", "v_proj"]} | fields
    return checkpoint(tensors(*suffixes, rank=rank, seed=seed), **fields)


def lower(checkpoint: Checkpoint, base: BaseSpec = BASE) -> AdapterProgram:
    return formats.lower(checkpoint, base, LIMITS)


def deltas(checkpoint: Checkpoint, base: BaseSpec = BASE) -> dict[str, Tensor]:
    """Module -> [out, in] that the checkpoint adds, as this server serves it."""
    found = {}
    for module in lower(checkpoint, base).modules:
        assert module.low_rank is not None
        found[module.module] = module.low_rank.b @ module.low_rank.a
    return found


def refusal(plan: MergePlan, *sources: Checkpoint) -> AdapterInvalid:
    with pytest.raises(AdapterInvalid) as refused:
        merged(plan, *sources)
    return refused.value


@pytest.mark.parametrize(
    ("field", "changes"),
    [
        ("weights", {"weights": (1.0,)}),
        ("weights", {"weights": (1.0, math.nan)}),
        ("weights", {"weights": (1.0, math.inf)}),
        ("weights", {"weights": (0.0, 0.0)}),
        ("density", {"method": MergeMethod.TIES}),
        ("density", {"method": MergeMethod.TIES, "density": 0.0}),
        ("density", {"method": MergeMethod.TIES, "density": 1.1}),
        ("density", {"method": MergeMethod.TIES, "density": math.nan}),
        ("density", {"density": 0.5}),
        ("majority_sign", {"majority_sign": "frequency"}),
        ("rank", {"rank": 4}),
        ("rank", {"method": MergeMethod.SVD, "rank": 0}),
        ("seed", {"seed": -1}),
        ("seed", {"seed": 1 << 64}),
    ],
)
def test_a_bad_plan_is_refused_by_field(field: str, changes: dict[str, Any]) -> None:
    good = plan(MergeMethod.LINEAR)
    merged(good)
    assert refusal(replace(good, **changes)).field == field


@pytest.mark.parametrize("count", [0, MAX_SOURCES + 1])
def test_the_number_of_sources_is_limited(count: int) -> None:
    sources = [source(0)] * count
    with pytest.raises(AdapterInvalid) as refused:
        merge_checkpoints(plan(MergeMethod.CAT, *[1.0] * count), sources, BASE)
    assert refused.value.field == "sources"


@pytest.mark.parametrize("method", EQUAL_RANKS)
def test_different_ranks_at_a_module_are_refused_with_what_to_do(method: MergeMethod) -> None:
    error = refusal(plan(method), source(0), source(1, rank=3))
    assert error.field == "method"
    assert "2, 3" in str(error)
    assert "use cat or svd" in str(error)


@pytest.mark.parametrize("method", EQUAL_RANKS)
def test_ranks_that_never_meet_may_differ(method: MergeMethod) -> None:
    result = merged(plan(method), source(0, "q_proj"), source(1, "v_proj", rank=3))
    ranks = {m.module: m.low_rank.rank for m in lower(result).modules if m.low_rank}
    assert {ranks[QUERY], ranks[VALUE]} == {2, 3}


@pytest.mark.parametrize(
    ("where", "bad"),
    [
        ("lora_magnitude_vector", checkpoint(use_dora=True)),
        ("lm_head", checkpoint(modules_to_save=["lm_head"])),
        ("alora_invocation_tokens", checkpoint(alora_invocation_tokens=[3])),
        (
            HEAD,
            checkpoint(
                tensors() | {f"base_model.model.{HEAD}.weight": torch.ones(24, HIDDEN)},
                modules_to_save=["lm_head"],
            ),
        ),
        (
            "lora_magnitude_vector",
            checkpoint(
                tensors() | {f"base_model.model.{QUERY}.lora_magnitude_vector": torch.ones(HIDDEN)}
            ),
        ),
        ("peft_type", checkpoint(peft_type="XLORA")),
        (
            "q_proj",
            checkpoint(
                tensors("q_proj")
                | {
                    f"base_model.model.{name}.bias": torch.ones(HIDDEN)
                    for name in BASE.modules
                    if name.endswith("q_proj")
                },
                target_modules=["q_proj"],
                bias="lora_only",
            ),
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_cannot_be_merged_is_refused_by_source_and_name(where: str, bad: Checkpoint) -> None:
    error = refusal(plan(MergeMethod.CAT), source(0), bad)
    assert all(r.where.startswith("sources[1].") for r in error.refusals)
    assert where in error.field


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"bias": torch.ones(HIDDEN)}, "a bias cannot be merged"),
        ({"output_scale": torch.ones(HIDDEN)}, "an output scale cannot be merged"),
        ({"input_scale": torch.ones(HIDDEN)}, "an input scale cannot be merged"),
        ({"weight": torch.ones(HIDDEN, HIDDEN)}, "a replaced weight cannot be merged"),
        ({"transform": torch.abs}, "a merged weight cannot be merged"),
    ],
)
def test_other_primitives_than_pairs_are_refused_by_name(
    fields: dict[str, Any], reason: str
) -> None:
    made = lower(source(0))
    other = replace(made, modules=(replace(made.modules[0], **fields),))
    with pytest.raises(AdapterInvalid) as caught:
        merge_adapters(plan(MergeMethod.CAT), [made, other], BASE.modules)
    (found,) = caught.value.refusals
    assert found.where == f"sources[1].{other.modules[0].module}"
    assert found.reason == reason


def test_pairs_of_other_modules_and_invocations_are_refused_by_name() -> None:
    made = lower(source(0))
    name = made.modules[0].module
    modules = {**BASE.modules, name: replace(BASE.modules[name], kind="experts", experts=2)}
    with pytest.raises(AdapterInvalid, match=f"{name}: of the kind experts"):
        merge_adapters(plan(MergeMethod.CAT, 1.0), [made], modules)
    with pytest.raises(AdapterInvalid, match="an invocation cannot be merged"):
        merge_adapters(plan(MergeMethod.CAT, 1.0), [replace(made, invocation=(7,))], BASE.modules)


@pytest.mark.parametrize("method", MergeMethod)
def test_values_that_overflow_are_refused(method: MergeMethod) -> None:
    huge = checkpoint({name: tensor * 0 + 1e30 for name, tensor in tensors().items()})
    error = refusal(plan(method, 1e38, 1e38), huge, huge)
    assert error.field == "weights"
    assert "overflow" in str(error)


@pytest.mark.parametrize("method", MergeMethod)
def test_the_result_survives_the_files_and_is_accepted(method: MergeMethod, tmp_path: Path) -> None:
    sources = [source(0, "q_proj", "v_proj"), source(1, "q_proj", "down_proj")]
    result = merged(plan(method), *sources)
    write_checkpoint(result, tmp_path)
    read = read_checkpoint(tmp_path, LIMITS)
    program = lower(read)
    assert program.digest == lower(result).digest
    assert {m.module for m in program.modules} == {
        name for name in BASE.modules if name.endswith(("q_proj", "v_proj", "down_proj"))
    }
    assert {m.scale for m in program.modules} == {1.0}
    assert read.tensors.keys() == result.tensors.keys()
    for name, tensor in read.tensors.items():
        assert torch.equal(tensor, result.tensors[name])


def test_patterns_name_one_module_and_no_other() -> None:
    names = {"proj": 2, "x.proj": 3, "xxproj": 4}
    modules = {name: BaseModule(name, "linear", HIDDEN, HIDDEN) for name in [*names, "y.x.proj"]}
    base = BaseSpec("odd", "odd", "odd", modules)
    ranks = names | {"y.x.proj": 5}
    weights: dict[str, Tensor] = {}
    for name, rank in ranks.items():
        weights |= pair(name, rank, base=base)
    exact = {f"^{name.replace('.', '[.]')}": rank for name, rank in ranks.items()}
    odd = checkpoint(weights, target_modules=list(names), rank_pattern=exact)
    result = merged(plan(MergeMethod.CAT, 0.5, 0.5), odd, odd, base=base)
    for name, delta in deltas(result, base).items():
        torch.testing.assert_close(delta, deltas(odd, base)[name])


def test_the_base_is_kept_when_all_sources_name_the_same() -> None:
    field = "base_model_name_or_path"
    here, there = source(0, **{field: "org/here"}), source(1, **{field: "org/there"})
    mix = plan(MergeMethod.LINEAR)
    assert merged(mix, here, replace(there, config=here.config)).config[field] == "org/here"
    assert field not in merged(mix, here, there).config
    assert field not in merged(mix, here, source(1)).config
    assert field not in merged(mix, source(1), here).config


@pytest.mark.parametrize("method", MergeMethod)
def test_the_layout_of_the_files_does_not_matter(method: MergeMethod) -> None:
    sources = [source(0), source(1)]
    turned = [replace(s, tensors=dict(reversed(s.tensors.items()))) for s in sources]
    first, second = merged(plan(method), *sources), merged(plan(method), *turned)
    assert first.config == second.config
    assert list(first.tensors) == list(second.tensors)
    assert all(torch.equal(t, second.tensors[name]) for name, t in first.tensors.items())


@pytest.mark.parametrize("method", DRAWING)
def test_the_seed_decides_what_is_dropped(method: MergeMethod) -> None:
    def digest(**fields: Any) -> str:
        return lower(merged(plan(method, **fields))).digest

    seeds = [0, 1, (1 << 64) - 1]
    assert len({digest(seed=seed) for seed in seeds}) == len(seeds)
    assert digest(seed=7) == digest(seed=7)
    assert digest(seed=7, density=1.0) == digest(seed=8, density=1.0)


@pytest.mark.parametrize("method", PRUNING)
def test_a_smaller_density_keeps_less(method: MergeMethod) -> None:
    def kept(density: float) -> int:
        rank = HIDDEN if method.on_deltas else None
        result = merged(plan(method, 1.0, 1.0, density=density, rank=rank))
        values = deltas(result) if method.on_deltas else result.tensors
        return sum(int((value.abs() > 1e-5).sum()) for value in values.values())

    assert kept(0.1) < kept(0.5) < kept(1.0)


@pytest.mark.parametrize("method", [MergeMethod.SVD, MergeMethod.MAGNITUDE_PRUNE_SVD])
@pytest.mark.parametrize("rank", [1, 3, None, 100])
def test_an_svd_gives_the_nearest_delta_of_the_rank(method: MergeMethod, rank: int | None) -> None:
    sources, weights = [source(0), source(1, rank=3)], (0.7, -0.4)
    result = merged(
        plan(method, *weights, rank=rank, density=1.0 if method.prunes else None), *sources
    )
    found = {m.module: m.low_rank for m in lower(result).modules}
    first, second = map(deltas, sources)
    for name, delta in deltas(result).items():
        exact = weights[0] * first[name] + weights[1] * second[name]
        low_rank = found[name]
        assert low_rank is not None
        assert low_rank.rank <= min(rank or 3, *exact.shape)
        left = torch.linalg.svdvals(exact.double())[low_rank.rank :]
        assert torch.linalg.norm((exact - delta).double()) == pytest.approx(
            float(left.square().sum().sqrt()), abs=1e-5
        )


def test_one_source_can_be_made_smaller() -> None:
    whole = source(0, "down_proj", rank=6)
    result = merged(plan(MergeMethod.SVD, 1.0, rank=2), whole)
    assert {m.low_rank.rank for m in lower(result).modules if m.low_rank} == {2}
    assert not torch.allclose(deltas(result)[DOWN], deltas(whole)[DOWN])
    same = merged(plan(MergeMethod.SVD, 1.0), whole)
    torch.testing.assert_close(deltas(same)[DOWN], deltas(whole)[DOWN], rtol=1e-4, atol=1e-4)


def test_a_merge_of_stored_adapters_is_stored(registry: AdapterRegistry) -> None:
    for seed, name in enumerate("ab"):
        push(registry, name, seed=seed)
    importer = make_importer(registry, [])
    how = plan(MergeMethod.DARE_TIES)
    made = importer.merge(["a", "b@1"], how, "c", replace=False, origin=UPLOAD).record
    program = registry.programs.program(made.digest)
    stored = [registry.programs.checkpoint(registry.names.get(n).digest) for n in "ab"]
    assert program.digest == lower(merged(how, *stored)).digest
    assert registry.leased == 0


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
