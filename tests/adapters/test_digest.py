from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from adaplex.adapters import formats
from adaplex.adapters.checkpoint import CONFIG, WEIGHTS, Checkpoint, read_checkpoint
from adaplex.adapters.digest import PATTERN, content_digest
from adaplex.adapters.formats.lora.config import HARMLESS, UNSUPPORTED, USED
from adaplex.adapters.limits import AdapterLimits
from adapters.handmade import (
    BASE,
    PREFIX,
    QUERY,
    checkpoint,
    config,
    files,
    pair,
    safetensors_bytes,
    tensors,
    write,
)

LIMITS = AdapterLimits()
KEY = f"{PREFIX}{QUERY}.lora_A.weight"


def digest(weights: Mapping[str, Tensor] | None = None, /, **fields: Any) -> str:
    found = content_digest(checkpoint(weights, **fields), USED)
    assert PATTERN.fullmatch(found)
    return found


PLAIN = digest()


def test_the_program_carries_it() -> None:
    assert formats.lower(checkpoint(), BASE, LIMITS).digest == PLAIN


@pytest.mark.parametrize("field", sorted((HARMLESS | UNSUPPORTED.keys()) - {"task_type"}))
def test_cosmetic_fields_do_not_change_it(field: str) -> None:
    for value in (None, False, "anything", {"a": 1}, ["x"]):
        assert digest(**{field: value}) == PLAIN


@pytest.mark.parametrize("field", sorted(USED - config().keys()))
def test_fields_without_a_value_do_not_change_it(field: str) -> None:
    empty: list[Any] = [None, [], {}]
    for value in empty:
        assert digest(**{field: value}) == PLAIN


def test_key_order_does_not_change_it() -> None:
    backwards = dict(reversed(config().items()))
    assert list(backwards) != list(config())
    assert content_digest(Checkpoint(backwards, tensors()), USED) == PLAIN


@pytest.mark.parametrize(
    ("field", "values"),
    [
        ("target_modules", ["v_proj", "q_proj"]),
        ("exclude_modules", ["b", "a", "c"]),
        ("layers_to_transform", [2, 10, 1]),
    ],
)
def test_list_order_does_not_change_it(field: str, values: list[Any]) -> None:
    assert digest(**{field: values}) == digest(**{field: values[::-1]})


@pytest.mark.parametrize("field", ["alora_invocation_tokens", "trainable_token_indices"])
def test_the_order_of_tokens_changes_it(field: str) -> None:
    assert digest(**{field: [1, 2]}) != digest(**{field: [2, 1]})


def test_the_layout_of_the_files_does_not_change_it(tmp_path: Path) -> None:
    """Tensors in another order in the file and its header, metadata, other white space."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    data = b""
    for name, tensor in reversed(tensors().items()):
        part = tensor.numpy().tobytes()
        place = [len(data), len(data) + len(part)]
        header[name] = {"dtype": "F32", "shape": list(tensor.shape), "data_offsets": place}
        data += part
    other = {
        CONFIG: json.dumps(config(), indent=7).encode(),
        WEIGHTS: safetensors_bytes(header, data),
    }
    assert other != files()
    found = read_checkpoint(write(tmp_path / "other", other), LIMITS)
    assert content_digest(found, USED) == PLAIN
    found = read_checkpoint(write(tmp_path / "plain", files()), LIMITS)
    assert content_digest(found, USED) == PLAIN


def test_memory_layout_does_not_change_it() -> None:
    strided = {name: tensor.t().contiguous().t() for name, tensor in tensors().items()}
    assert not strided[KEY].is_contiguous()
    assert digest(strided) == PLAIN


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("peft_type", "OTHER"),
        ("r", 3),
        ("lora_alpha", 5),
        ("use_rslora", True),
        ("rank_pattern", {"q_proj": 2}),
        ("alpha_pattern", {"q_proj": 4}),
        ("target_modules", ["q_proj"]),
        ("exclude_modules", ["down_proj"]),
        ("layers_to_transform", [0, 1]),
        ("layers_to_transform", 0),
        ("layers_pattern", "layers"),
        ("bias", "all"),
        ("lora_bias", True),
        ("use_dora", True),
        ("use_qalora", True),
        ("alora_invocation_tokens", [1]),
        ("modules_to_save", ["norm"]),
        ("trainable_token_indices", [1]),
        ("target_parameters", ["experts.down_proj"]),
        ("ensure_weight_tying", True),
    ],
)
def test_every_semantic_field_changes_it(field: str, value: object) -> None:
    assert field in USED
    assert digest(**{field: value}) != PLAIN


@pytest.mark.parametrize("field", ["rank_pattern", "alpha_pattern"])
def test_the_order_of_patterns_changes_it(field: str) -> None:
    """The first pattern that matches wins."""
    first = digest(**{field: {"q_proj": 2, "layers.0.*": 4}})
    assert first != digest(**{field: {"layers.0.*": 4, "q_proj": 2}})


@pytest.mark.parametrize("bit", [0, 7, 8, 31])
@pytest.mark.parametrize("element", [0, 9, 15])
def test_any_bit_of_a_tensor_changes_it(bit: int, element: int) -> None:
    changed = tensors()
    flat = changed[KEY].view(-1).view(torch.int32)
    flat[element] ^= -(2**31) if bit == 31 else 1 << bit
    assert digest(changed) != PLAIN


def test_name_dtype_and_shape_of_a_tensor_change_it() -> None:
    renamed = tensors()
    renamed[f"{KEY}x"] = renamed.pop(KEY)
    reshaped = tensors()
    reshaped[KEY] = reshaped[KEY].reshape(4, 4)
    retyped = tensors()
    retyped[KEY] = retyped[KEY].view(torch.float16)
    swapped = tensors()
    twin = KEY.replace("layers.0", "layers.1")
    swapped[KEY] = pair(QUERY, seed=5)[KEY]
    back = dict(swapped)
    back[KEY], back[twin] = back[twin], back[KEY]
    found = [digest(weights) for weights in (renamed, reshaped, retyped, swapped, back)]
    assert len({*found, PLAIN}) == 6


def test_halves_of_the_same_bytes_differ_by_dtype() -> None:
    ones = {KEY: torch.zeros(2, 2, dtype=torch.float16)}
    other = {KEY: torch.zeros(2, 2, dtype=torch.bfloat16)}
    assert digest(ones) != digest(other)


def test_it_stays_what_it_is() -> None:
    """Stored adapters are found by it: a change here orphans every store."""
    weights = {"t": torch.arange(4.0)}
    found = content_digest(Checkpoint({"r": 2, "target_modules": ["b", "a"]}, weights), USED)
    assert found == "sha256:034d91e235a8cdba1ee639468311ac1edc9088cc68eba2daeb1005262370a863"


def test_other_ways_to_say_the_same_do_not_change_it() -> None:
    """Older PEFT writes no use_rslora, and JSON knows one kind of number."""
    assert digest(use_rslora=False) == PLAIN
    assert digest(lora_alpha=4.0) == PLAIN
    unbiased = {name: value for name, value in config().items() if name != "bias"}
    assert content_digest(Checkpoint(unbiased, tensors()), USED) == PLAIN
