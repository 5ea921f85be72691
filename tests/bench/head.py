"""Greedy decode steps by the output layer itself and by its 8-bit copy, in pairs.

    make bench-head                                     # the default model in nf4
    make bench-head ARGS="--rows 1,16 --threads 1 --cpu-seconds"

Each step is computed by both, in turn, from the same tokens, which must give the same tokens.
Prompts are chats, since random tokens have flat distributions. `--cpu-seconds` counts the seconds
of the process, for a machine that others use.
"""

from __future__ import annotations

import argparse
import time
from statistics import mean, median

import torch

from adaplex.engine.batch import Batch, Chunk
from adaplex.model.base.source import default_cache
from adaplex.model.constants import PANEL_COLUMNS
from adaplex.model.forward.native_forward import NativeForward
from bench.engine import counts
from rig import ModelRig

QUESTIONS = ("What is the capital of France?", "Write a story about a dog.", "Explain gravity.")
PAIRS = 3
"""Pairs of a step."""


@torch.inference_mode()
def measure(rig: ModelRig, rows: int, options: argparse.Namespace) -> str:
    """Returns a line of the table: the least and the median time of a step by both, and how many
    panels of the layer the steps by the copy read for each row.
    """
    forward = rig.runner._forward
    assert isinstance(forward, NativeForward)
    if not options.layers:
        forward._model.layers = 0
    clock = time.process_time if options.cpu_seconds else time.perf_counter
    sequences = [rig.sequence(chat(rig, i), room=options.steps + 1) for i in range(rows)]
    batch = Batch(tuple(Chunk(each, 0, len(each)) for each in sequences))
    seconds: dict[bool, list[float]] = {True: [], False: []}
    panels: list[int] = []
    tokens = forward(batch)[1]
    for _ in range(options.steps):
        for sequence, token in zip(sequences, tokens, strict=True):
            sequence.tokens.append(token)
        batch = Batch(tuple(Chunk(each, len(each) - 1, 1) for each in sequences))
        for whole in (True, False) * PAIRS:
            logits = forward._logits_buffer(rows)[:, ::PANEL_COLUMNS]
            logits.fill_(torch.nan)
            begun = clock()
            found = forward(batch, needs_logits=whole)[1]
            seconds[whole].append(1e3 * (clock() - begun))
            if whole:
                tokens = found
                continue
            panels += (~logits.isnan()).sum(-1).tolist()
            assert found == tokens, "the copy gives other tokens"
    layer, copy = seconds[True], seconds[False]
    return (
        f"{rows:>3} rows: {min(layer):.2f} ms by the layer, {min(copy):.2f} ms by the copy, "
        f"{min(layer) / min(copy):.2f} x (medians {median(layer) / median(copy):.2f} x), "
        f"{mean(panels):.1f} panels a row"
    )


def chat(rig: ModelRig, index: int) -> list[int]:
    """Returns the tokens of a chat; each index has another one."""
    text = f"{QUESTIONS[index % len(QUESTIONS)]} Answer in {index + 2} sentences."
    tokens: list[int] = rig.base.tokenizer.apply_chat_template(
        [{"role": "user", "content": text}], add_generation_prompt=True, return_dict=False
    )
    return tokens


def main() -> None:
    """Runs the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rows", type=counts, default=[1, 8, 16])
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--model", default="smollm2-135m-instruct")
    parser.add_argument("--quantization", default="nf4")
    parser.add_argument("--cpu-seconds", action="store_true")
    parser.add_argument("--no-layers", dest="layers", action="store_false", help="the head alone")
    options = parser.parse_args()
    saved = default_cache() / "quantized"
    rig = ModelRig(options.model, options.quantization, saved=saved, int8_head=True)
    assert rig.base.kernels is not None
    torch.set_num_threads(1)
    rig.base.kernels.use_threads(options.threads)
    print(f"{rig.base.kernels.instructions.name}, {options.threads} threads")
    for rows in options.rows:
        print(measure(rig, rows, options), flush=True)


if __name__ == "__main__":
    main()
