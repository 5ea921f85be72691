"""Converts GGUF to a directory that Hugging Face libraries read: config, tokenizer, safetensors.

GGUF is only read: its weights are dequantized once, and the server quantizes the result in its own
formats.

Weights are stored as bf16, half the bytes of fp32. Measured on the default model, whose Q4_1
blocks dequantize to fp32: each weight moves by at most 0.39 % (0.14 % of the norm in all), the
next-token distribution by a KL of 1e-4, and no greedy token changes. fp16 would be closer
(0.05 %) but cannot hold the range of every model, and is no compute type of the CPU.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import numpy as np
import torch
from gguf import GGUFReader, gguf_reader
from tokenizers import pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig
from transformers.utils import logging

from adaplex.model.imports.light_imports import import_meta_kernels

SPLITS_DIGITS = frozenset({"smollm", "starcoder", "refact", "command-r"})
"""Values of `tokenizer.ggml.pre` whose tokenizers cut numbers into digits before anything else.
transformers reads them as plain byte-level BPE, which gives other tokens for white space before a
digit."""


def convert_gguf(file: Path, target: Path) -> None:
    """Writes the model of `file` to the existing directory `target`.

    Raises the errors of gguf and transformers: OSError, ValueError, KeyError and others.
    """
    import_meta_kernels()  # transformers initializes modules without data in any way
    with _quiet_bars(), _plain_arrays():
        _convert(file, target)


def _convert(file: Path, target: Path) -> None:
    ids = ("tokenizer.ggml.eos_token_id", "tokenizer.ggml.eot_token_id")
    facts = _metadata(file, "tokenizer.ggml.pre", *ids)
    model = AutoModelForCausalLM.from_pretrained(
        file.parent,
        gguf_file=file.name,
        dtype=torch.bfloat16,
        quantization_config=GgufConfig(dequantize=True),
    )
    _add_end_of_turn(model, facts.get("tokenizer.ggml.eot_token_id"))
    model.save_pretrained(target)

    tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    if (eos := facts.get("tokenizer.ggml.eos_token_id")) is not None:
        # with two end tokens in a file, transformers before 5.23 uses another special token as eos
        tokenizer.eos_token = tokenizer.convert_ids_to_tokens(eos)
    tokenizer.model_max_length = model.config.max_position_embeddings
    if facts.get("tokenizer.ggml.pre") in SPLITS_DIGITS:
        tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Digits(individual_digits=True),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
            ]
        )
    tokenizer.save_pretrained(target)


def _metadata(file: Path, *keys: str) -> dict[str, Any]:
    """Returns those of the metadata fields `keys` that `file` has."""
    fields = GGUFReader(file).fields
    return {key: fields[key].contents() for key in keys if key in fields}


@contextmanager
def _quiet_bars() -> Iterator[None]:
    """Disables progress bars unless stderr is a terminal: they would fill a log."""
    shown = logging.is_progress_bar_enabled()
    if not sys.stderr.isatty():
        logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


@contextmanager
def _plain_arrays() -> Iterator[None]:
    """Makes gguf's reader map files as plain arrays. A million small slices of numpy's own class of
    mapped arrays, one for each word of a vocabulary and more, are most of a conversion's time.
    """

    def mapped(*arguments: Any, **keywords: Any) -> np.ndarray:
        return np.memmap(*arguments, **keywords).view(np.ndarray)

    names = SimpleNamespace(**{**vars(np), "memmap": mapped})
    with mock.patch.object(gguf_reader, "np", names):
        yield


def _add_end_of_turn(model: Any, token: int | None) -> None:
    """Adds the chat template's end-of-turn token to the tokens that end generation."""
    eos = model.generation_config.eos_token_id
    known = {token} if token is not None else set()
    known |= set(eos) if isinstance(eos, list) else {eos} - {None}
    if known:
        model.generation_config.eos_token_id = sorted(known) if len(known) > 1 else known.pop()
