"""Sampling: each parameter against its definition; draws depend on seed and index only."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from transformers import (
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from adaplex.engine.request import OVERFLOWED, Request, SampledToken, SamplingParams
from adaplex.engine.sequence import Sequence
from adaplex.model.forward import sampler
from adaplex.model.forward.sampler import likeliest, penalize, sample, uniform

VOCABULARY = 1000


def sequence(params: SamplingParams, output: tuple[int, ...] = ()) -> Sequence:
    made = Sequence(Request("r", (5, 6, 7), params))
    made.tokens.extend(output)
    return made


def sampled(rows: torch.Tensor, sequences: list[Sequence]) -> list[SampledToken]:
    return sample(rows, sequences, likeliest(rows))


def draw(logits: torch.Tensor, params: SamplingParams, output: tuple[int, ...] = ()) -> int:
    return sampled(logits[None], [sequence(params, output)])[0].token


def logits(seed: int = 0) -> torch.Tensor:
    return torch.randn(VOCABULARY, generator=torch.Generator().manual_seed(seed)) * 3


def kept(row: torch.Tensor, **fields: float) -> set[int]:
    """Returns every token that some seed draws."""
    return {
        draw(row, SamplingParams(temperature=1.0, seed=seed, **fields))  # type: ignore[arg-type]
        for seed in range(600)
    }


def test_greedy_is_the_argmax() -> None:
    assert draw(logits(), SamplingParams()) == int(logits().argmax())


def test_the_draw_depends_on_seed_and_index_alone() -> None:
    params = SamplingParams(temperature=1.0, seed=11)
    rows = torch.stack([logits(i) for i in range(5)])
    together = sampled(rows, [sequence(params, (1,) * i) for i in range(5)])
    for i in range(5):
        assert sampled(rows[i : i + 1], [sequence(params, (1,) * i)])[0] == together[i]
    assert len({uniform(11, i) for i in range(100)} | {uniform(12, i) for i in range(100)}) == 200


def test_draws_follow_the_softmax() -> None:
    row = torch.tensor([2.0, 1.0, 0.0, -1.0])
    counts = Counter(draw(row, SamplingParams(temperature=0.7, seed=seed)) for seed in range(4000))
    expected = torch.softmax(row / 0.7, -1)
    for token in range(4):
        assert abs(counts[token] / 4000 - float(expected[token])) < 0.03


@pytest.mark.parametrize("k", [1, 3, 40])
def test_top_k_keeps_what_transformers_keeps(k: int) -> None:
    row = logits()
    allowed = torch.isfinite(TopKLogitsWarper(k)(None, row[None])[0]).nonzero().flatten().tolist()
    drawn = kept(row, top_k=k)
    assert drawn <= set(allowed)
    assert k > 3 or drawn == set(allowed)


@pytest.mark.parametrize("p", [0.05, 0.5, 0.9, 0.999])
@pytest.mark.parametrize("flat", [False, True])
def test_top_p_keeps_what_transformers_keeps(p: float, flat: bool) -> None:
    row = logits() * (0.05 if flat else 1.0)
    warped = TopPLogitsWarper(p)(None, row[None])[0]
    allowed = set(torch.isfinite(warped).nonzero().flatten().tolist())
    ids = sampler._nucleus(row.exp(), p)
    assert len(set(ids.tolist()) ^ allowed) <= 1, "only the token at the edge may round"
    assert kept(row, top_p=p) <= allowed | set(ids.tolist())


@pytest.mark.parametrize("p", [1e-9, 0.3, 0.95, 0.9999])
@pytest.mark.parametrize("spread", [0.0, 0.01, 1.0, 8.0])
def test_top_p_is_found_among_all_tokens(p: float, spread: float) -> None:
    """Logits are equal, almost equal, or a few stand out; some are -inf."""
    row = torch.randn(3000, generator=torch.Generator().manual_seed(5)) * spread
    row[::7] = -torch.inf
    shares = torch.softmax(row.double(), -1)
    ranked = shares.sort(descending=True)
    least = ranked.values[int((ranked.values.cumsum(-1) - ranked.values < p).sum()) - 1]
    ids = sampler._nucleus((row - row.max()).exp(), p)
    assert torch.isfinite(row[ids]).all()
    assert set((shares > least * 1.001).nonzero().flatten().tolist()) <= set(ids.tolist())
    assert set(ids.tolist()) <= set((shares >= least * 0.999).nonzero().flatten().tolist())


def test_top_p_inside_top_k() -> None:
    row = torch.tensor([3.0, 2.0, 1.0, 0.0, -9.0])
    warped = TopPLogitsWarper(0.9)(None, TopKLogitsWarper(3)(None, row[None]))[0]
    allowed = set(torch.isfinite(warped).nonzero().flatten().tolist())
    assert kept(row, top_k=3, top_p=0.9) == allowed


def test_min_p_keeps_what_transformers_keeps() -> None:
    row = logits()
    warped = MinPLogitsWarper(0.2)(None, row[None])[0]
    allowed = set(torch.isfinite(warped).nonzero().flatten().tolist())
    assert 1 < len(allowed) < 20
    assert kept(row, min_p=0.2) == allowed


def test_repetition_penalty_is_that_of_transformers() -> None:
    row, tokens = logits(), [5, 6, 7, 8, 8, 9]
    got = penalize(row, tokens, 3, SamplingParams(repetition_penalty=1.7))
    oracle = RepetitionPenaltyLogitsProcessor(1.7)(torch.tensor([tokens]), row[None].clone())[0]
    assert torch.equal(got, oracle)


def test_presence_and_frequency_count_the_output_only() -> None:
    row = torch.zeros(10)
    params = SamplingParams(presence_penalty=0.5, frequency_penalty=0.25)
    got = penalize(row, [1, 2, 3, 3, 3, 4], 2, params)
    assert got.tolist() == [0, 0, 0, -1.25, -0.75, 0, 0, 0, 0, 0]


def test_min_tokens_holds_stop_tokens_back() -> None:
    row = logits()
    best = int(row.argmax())
    params = SamplingParams(min_tokens=2, stop_token_ids=frozenset({best}))
    assert draw(row, params) != best
    assert draw(row, params, (1,)) != best
    assert draw(row, params, (1, 1)) == best


def test_logprobs_are_the_models_own() -> None:
    row = logits()
    params = SamplingParams(temperature=0.3, repetition_penalty=2.0, logprobs=3, seed=4)
    out = sampled(row[None], [sequence(params)])[0]
    expected = torch.log_softmax(row, -1)
    assert out.logprob is not None
    assert out.logprob.token == out.token
    assert out.logprob.logprob == pytest.approx(float(expected[out.token]))
    values, ids = expected.topk(3)
    assert [t for t, _ in out.logprob.top] == ids.tolist()
    assert [p for _, p in out.logprob.top] == pytest.approx(values.tolist())
    silent = sampled(row[None], [sequence(SamplingParams(logprobs=0))])[0]
    assert silent.logprob is not None
    assert silent.logprob.top == ()


def test_a_row_that_overflowed_is_marked_and_changes_no_other() -> None:
    rows = torch.stack([logits(0), logits(1), logits(2)])
    rows[1, 3] = torch.nan
    out = sampled(rows, [sequence(SamplingParams()) for _ in range(3)])
    assert out[1] == SampledToken(OVERFLOWED)
    assert [out[0].token, out[2].token] == [int(rows[0].argmax()), int(rows[2].argmax())]


@pytest.mark.parametrize(
    "fields", [{"temperature": 1e-40}, {"temperature": 1e-5}, {"temperature": 1e-4, "top_p": 0.5}]
)
def test_a_temperature_near_zero_is_greedy(fields: dict[str, float]) -> None:
    params = SamplingParams(seed=3, **fields)  # type: ignore[arg-type]  # floats go to floats
    assert draw(logits(), params) == int(logits().argmax())


def test_extreme_penalties_stay_finite() -> None:
    row = logits()
    params = SamplingParams(temperature=1.0, repetition_penalty=1e-40, seed=1)
    got = penalize(row, [5, 6, 7], 3, params)
    assert bool(torch.isfinite(got).all())
    assert draw(row, params) in {5, 6, 7}
