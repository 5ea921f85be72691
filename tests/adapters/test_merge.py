"""Merging: what comes out of it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from adaplex.adapters.checkpoint import read_checkpoint, write_checkpoint
from adaplex.adapters.compose.merge import MergeMethod
from adaplex.adapters.program.base_spec import BaseModule, BaseSpec
from adaplex.adapters.registry.registry import AdapterRegistry
from adapters.handmade import (
    BASE,
    DOWN,
    HIDDEN,
    QUERY,
    UPLOAD,
    VALUE,
    checkpoint,
    make_importer,
    pair,
    push,
)
from adapters.merges import EQUAL_RANKS, LIMITS, deltas, lower, merged, plan, source

PRUNING = [method for method in MergeMethod if method.prunes]
DRAWING = [method for method in MergeMethod if method.draws]


@pytest.mark.parametrize("method", EQUAL_RANKS)
def test_ranks_that_never_meet_may_differ(method: MergeMethod) -> None:
    result = merged(plan(method), source(0, "q_proj"), source(1, "v_proj", rank=3))
    ranks = {m.module: m.low_rank.rank for m in lower(result).modules if m.low_rank}
    assert {ranks[QUERY], ranks[VALUE]} == {2, 3}


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
