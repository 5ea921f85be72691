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
from tempfile import TemporaryDirectory
from types import SimpleNamespace
from typing import Any
from unittest import mock

import numpy as np
import torch
from gguf import GGUFReader, gguf_reader
from tokenizers import pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig
from transformers.modeling_gguf_pytorch_utils import (
    TENSOR_PROCESSORS,
    TensorProcessor,
    get_gguf_hf_weights_map,
)
from transformers.utils import logging

from adaplex.model.base.read_weights import check_whole, quiet_report, refuse
from adaplex.model.imports.light_imports import import_meta_kernels

SPLITS_DIGITS = frozenset({"smollm", "starcoder", "refact", "command-r"})
"""Values of `tokenizer.ggml.pre` whose tokenizers cut numbers into digits before anything else.
transformers reads them as plain byte-level BPE, which gives other tokens for white space before a
digit."""
CONVERT_AGAIN = "convert the file again, or use the safetensors checkpoint of the model"
ROPE_FACTORS = "rope_freqs.weight"
"""Divisors of the rotary frequencies, as in files of Llama 3.1. transformers does not read them."""


def convert_gguf(file: Path, target: Path) -> None:
    """Writes the model of `file` to the existing directory `target`.

    Raises ModelSourceError if the file has not exactly the weights of its architecture, and the
    errors of gguf and transformers: OSError, ValueError, KeyError and others.
    """
    import_meta_kernels()  # transformers initializes modules without data in any way
    # transformers reads a folder, and what else lies there would change the model: an adapter, say
    with _quiet_bars(), _plain_arrays(), TemporaryDirectory(prefix="adaplex-") as alone:
        link = Path(alone) / f"model{file.suffix}"
        link.symlink_to(file.resolve())
        _convert(file, link, target)


def _convert(named: Path, file: Path, target: Path) -> None:
    """Converts `file`, a link to `named`, which errors name."""
    ids = ("tokenizer.ggml.eos_token_id", "tokenizer.ggml.eot_token_id")
    facts = _metadata(file, "tokenizer.ggml.pre", *ids)
    made: Any
    with quiet_report():
        made = AutoModelForCausalLM.from_pretrained(
            file.parent,
            gguf_file=file.name,
            dtype=torch.bfloat16,
            quantization_config=GgufConfig(dequantize=True),
            ignore_mismatched_sizes=True,  # refused by check_whole, with names
            output_loading_info=True,
        )
    model, info = made
    info["unexpected_keys"] -= {ROPE_FACTORS}  # checked next
    describing = {"config": "its metadata", "remedy": CONVERT_AGAIN}
    check_whole(str(named), named.name, model, info, (), **describing)
    _check_all_used(named, file, model)
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


def _check_all_used(named: Path, file: Path, model: Any) -> None:
    """Raises ModelSourceError if the model has fewer numbers than the file: transformers drops some
    tensors that it does not know without a report.
    """
    tensors = GGUFReader(file).tensors
    factors = [each.data for each in tensors if each.name == ROPE_FACTORS]
    if any((data != 1).any() for data in factors):
        reason = f"{ROPE_FACTORS} scales rotary frequencies, which a conversion loses"
        refuse(str(named), [reason], "use the safetensors checkpoint of the model")
    stored = {each.name: int(each.n_elements) for each in tensors if each.name != ROPE_FACTORS}
    made = {each.data_ptr(): each.numel() for each in model.state_dict().values()}
    if sum(stored.values()) > sum(made.values()):
        kind = TENSOR_PROCESSORS.get(model.config.model_type, TensorProcessor)
        processor = kind(config=model.config.to_dict())  # type: ignore[no-untyped-call]
        known = get_gguf_hf_weights_map(model, processor)
        reasons = [
            f"{name} in {named.name} is no weight of {type(model).__name__}"
            for name in sorted(stored.keys() - known.keys())
            if "_exps" not in name
        ]
        reasons = reasons or [f"not all tensors of {named.name} were read"]
        refuse(str(named), reasons, CONVERT_AGAIN)


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
