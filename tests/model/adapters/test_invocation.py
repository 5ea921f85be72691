"""Adapters that apply from where they are invoked on, against HF PEFT's activated LoRA."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from adaplex.engine.batch import Chunk
from adaplex.engine.request import AdapterMode
from adaplex.model.forward.protocol import runs_of
from peft_adapters import Oracle, everything, load_plain, save_adapter
from rig import BLOCK, ModelRig, lowered, prompt

INVOCATION = (301, 302)
MODES = [AdapterMode.UNMERGED, AdapterMode.MERGED]
INVOKED_AT = 19
PROMPT = [*prompt(4), *INVOCATION, *prompt(13, seed=1), *INVOCATION, *prompt(9, seed=2)]
"""A prompt with the invocation twice; the last begins in the second block."""


def save_activated_lora(model: Path, directory: Path, seed: int = 0) -> Path:
    """Saves an activated LoRA by PEFT; returns its directory."""
    return save_adapter(
        load_plain(model),
        directory,
        seed=seed,
        r=4,
        target_modules=everything("llama"),
        alora_invocation_tokens=list(INVOCATION),
    )


def peft_logits(model: Path, directory: Path, tokens: list[int]) -> Tensor:
    """Logits [vocabulary] after the last token, by `generate`, which finds the invocation."""
    oracle = Oracle(load_plain(model), directory)
    ids = torch.tensor([tokens])
    out = oracle.model.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=1,
        do_sample=False,
        return_dict_in_generate=True,
        output_logits=True,
    )
    logits: Tensor = out.logits[0][0]
    return logits


@pytest.mark.parametrize("native", [True, False])
def test_answers_are_those_of_peft(
    native: bool, tiny_model: Callable[[str], Path], tmp_path: Path
) -> None:
    model = tiny_model("llama")
    directory = save_activated_lora(model, tmp_path / "a")
    wanted = peft_logits(model, directory, PROMPT)
    rig = ModelRig(model, native=native)
    made = lowered(directory, rig.base.spec)
    for mode in MODES:
        sequence = rig.sequence(PROMPT, rig.add(made, mode))
        assert sequence.adapter_from == INVOKED_AT
        logits = rig.prefill(sequence)[0]
        assert (logits - wanted).abs().max() < 1e-4
    from_the_start = rig.add(replace(made, invocation=(), digest="sha256:start"))
    assert (rig.prefill(rig.sequence(PROMPT, from_the_start))[0] - wanted).abs().max() > 1e-2
    assert (rig.prefill(rig.sequence(PROMPT))[0] - wanted).abs().max() > 1e-2


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("native", [True, False])
def test_any_chunks_in_any_batch_give_the_same_bits(
    native: bool, mode: AdapterMode, tiny_model: Callable[[str], Path], tmp_path: Path
) -> None:
    model = tiny_model("llama")
    rig = ModelRig(model, native=native)
    refs = [
        rig.add(lowered(save_activated_lora(model, tmp_path / str(i), i), rig.base.spec), mode)
        for i in range(2)
    ]
    alone = [rig.prefill(rig.sequence(PROMPT, ref))[0] for ref in (*refs, None)]
    together = rig.prefill(*(rig.sequence(PROMPT, ref) for ref in (*refs, None)))
    assert torch.equal(torch.stack(alone), together)
    assert (alone[0] - alone[1]).abs().max() > 1e-2
    for ends in ((18, 19), (19, 20, 21), (25,), (7, 29)):
        cut, start = rig.sequence(PROMPT, refs[0]), 0
        for end in ends:
            rig.forward(Chunk(cut, start, end - start), Chunk(rig.sequence(PROMPT), 0, 5))
            start = end
        rest = rig.forward(Chunk(cut, start, len(cut) - start))
        assert torch.equal(rest[0], alone[0])


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("native", [True, False])
def test_a_block_of_the_base_serves_what_comes_before_the_invocation(
    native: bool, mode: AdapterMode, tiny_model: Callable[[str], Path], tmp_path: Path
) -> None:
    """And the other way round: base and adapter write the same bits to it."""
    model = tiny_model("llama")
    rig = ModelRig(model, native=native)
    ref = rig.add(lowered(save_activated_lora(model, tmp_path / "a"), rig.base.spec), mode)
    base, invoked = rig.sequence(PROMPT), rig.sequence(PROMPT, ref)
    wanted = [rig.prefill(sequence)[0] for sequence in (base, invoked)]
    for first, second in ((base, invoked), (invoked, base)):
        shared = rig.sequence(PROMPT, second.adapter)
        shared.blocks[0] = first.blocks[0]
        rest = rig.forward(Chunk(shared, BLOCK, len(shared) - BLOCK))[0]
        assert torch.equal(rest, wanted[second is invoked])


def test_a_run_ends_where_an_adapter_begins_to_apply(
    tiny_model: Callable[[str], Path], tmp_path: Path
) -> None:
    model = tiny_model("llama")
    rig = ModelRig(model, native=False)
    ref = rig.add(lowered(save_activated_lora(model, tmp_path / "a"), rig.base.spec))
    invoked, base = rig.sequence(PROMPT, ref), rig.sequence(PROMPT)
    chunks = (Chunk(base, 0, 3), Chunk(invoked, 10, 12), Chunk(invoked, 22, 4))
    assert runs_of(chunks, [3, 12, 4]) == [(None, 0, 12), (ref, 12, 19)]
    assert runs_of(chunks, [1, 1, 1]) == [(None, 0, 1), (ref, 1, 3)]
    before = Chunk(invoked, 0, 9)
    assert runs_of((before, chunks[1]), [9, 1]) == [(None, 0, 9), (ref, 9, 10)]
    assert runs_of((before,), [1]) == [(None, 0, 1)]
