"""Sampler: logits to tokens, one row at a time, from nothing but the row and its request.

The draw of the i-th output token of a request depends on its seed and i alone, so that a request
has the same output whatever else runs, and also after it is preempted and computed again.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence as Seq

import numpy as np
import torch
from torch import Tensor

from adaplex.engine.request import OVERFLOWED, Logprob, SampledToken, SamplingParams
from adaplex.engine.sequence import Sequence
from adaplex.model.tensors import int64_tensor


def likeliest(logits: Tensor) -> list[int]:
    """logits [rows, vocabulary] -> argmax of each row, -1 for a row that is not finite."""
    finite = torch.isfinite(logits.amax(-1))
    tops: list[int] = torch.where(finite, logits.argmax(-1), -1).tolist()
    return tops


def sample(logits: Tensor, sequences: Seq[Sequence], tops: Seq[int]) -> list[SampledToken]:
    """logits fp32 [rows, vocabulary], tops as of `likeliest` -> a token for each of `sequences`, by
    the row of the same index.

    A row that is not finite gives OVERFLOWED, for that row alone.
    """
    return [
        SampledToken(OVERFLOWED) if top < 0 else _sample_row(logits, i, sequence, top)
        for i, (sequence, top) in enumerate(zip(sequences, tops, strict=True))
    ]


def _sample_row(rows: Tensor, index: int, sequence: Sequence, top: int) -> SampledToken:
    """rows [rows, vocabulary] -> a token by the row at `index`, whose argmax is `top`."""
    params = sequence.request.sampling
    if params.plain:
        return SampledToken(top)
    logits = rows[index]
    produced = sequence.output_len
    held_back = produced < params.min_tokens and bool(params.stop_token_ids)
    changed = logits
    if params.penalized:
        tokens = sequence.tokens[sequence.leading :]
        changed = penalize(changed, tokens, sequence.prompt_len, params)
    if held_back:
        changed = changed.clone() if changed is logits else changed
        changed[list(params.stop_token_ids)] = -torch.inf
    if params.greedy:
        token = top if changed is logits else int(changed.argmax())
    else:
        token = _draw(changed, params, uniform(params.seed, produced))
    return SampledToken(token, _logprob(logits, token, params.logprobs))


def uniform(seed: int, index: int) -> float:
    """Returns a number in [0, 1), fixed by the seed and the index of the output token."""
    digest = hashlib.blake2b(f"{seed}/{index}".encode(), digest_size=8).digest()
    return (int.from_bytes(digest, "little") >> 11) / 2**53


def penalize(logits: Tensor, tokens: Seq[int], prompt_len: int, params: SamplingParams) -> Tensor:
    """logits [vocabulary] -> a copy with the repetition penalty over all tokens, then presence and
    frequency penalties over the output.

    Same definitions as Hugging Face (repetition) and the OpenAI API (presence, frequency).
    """
    logits = logits.clone()
    present = int64_tensor(tokens, logits.device)
    if params.repetition_penalty != 1.0:
        values = logits[present]
        penalty = params.repetition_penalty
        changed = torch.where(values > 0, values / penalty, values * penalty)
        logits[present] = torch.nan_to_num(changed)  # equal values for a repeated token
    if prompt_len < len(tokens):
        ids, counts = present[prompt_len:].unique(return_counts=True)
        logits[ids] -= params.presence_penalty + params.frequency_penalty * counts
    return logits


def _draw(logits: Tensor, params: SamplingParams, chance: float) -> int:
    """logits [vocabulary], chance in [0, 1) -> a token: an inverse-CDF draw after temperature,
    min_p, top_k and top_p, in this order.
    """
    ids = None
    if params.top_k:  # applied first: it keeps the same tokens, and fewer are weighed
        logits, ids = logits.topk(min(params.top_k, len(logits)))
    weights = logits.sub(logits.max()).div_(params.temperature).exp_()
    if params.min_p > 0.0:
        weights.masked_fill_(weights < params.min_p, 0.0)
    if params.top_p < 1.0:
        places = _nucleus(weights, params.top_p)
        weights, ids = weights[places], places if ids is None else ids[places]
    sums = weights.cumsum(-1, dtype=torch.float64)
    place = int(torch.searchsorted(sums, chance * float(sums[-1]), right=True))
    place = min(place, len(sums) - 1)
    return place if ids is None else int(ids[place])


def _nucleus(weights: Tensor, top_p: float) -> Tensor:
    """weights [candidates] -> places of the fewest, likeliest tokens with top_p of the mass."""
    total = weights.sum()
    # The tokens below this bound together have less mass than top_p leaves out.
    places = _where(weights >= total * ((1.0 - top_p) / len(weights)))
    likely = weights[places]
    ranked = _descending(likely)
    before = ranked.cumsum(-1) - ranked
    least = ranked[max(int((before < top_p * total).sum()), 1) - 1]
    return places[likely >= least]


def _where(wanted: Tensor) -> Tensor:
    """wanted bool [n] -> places of True; on a CPU by numpy, which finds few among many faster than
    torch.
    """
    if wanted.device.type != "cpu":
        return wanted.nonzero()[:, 0]
    return torch.from_numpy(np.flatnonzero(wanted.numpy()))


def _descending(values: Tensor) -> Tensor:
    """values [n] -> values, descending; on a CPU by numpy, since torch sorts places too."""
    if values.device.type != "cpu":
        return values.sort(descending=True).values
    return torch.from_numpy(np.sort(values.numpy())[::-1].copy())


def _logprob(logits: Tensor, token: int, count: int | None) -> Logprob | None:
    """logits [vocabulary] -> log probabilities of the model, before penalties and temperature."""
    if count is None:
        return None
    logprobs = torch.log_softmax(logits, -1)
    values, ids = logprobs.topk(count)
    top = tuple(zip(ids.tolist(), values.tolist(), strict=True))
    return Logprob(token, float(logprobs[token]), top)
