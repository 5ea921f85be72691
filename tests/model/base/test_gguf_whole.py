"""A GGUF base is converted whole, and nothing beside the file is in it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gguf import GGUFWriter

from adaplex.model.base.source import resolve_model
from adaplex.model.errors import ModelSourceError
from model.base.gguf_bases import tiny_llama, write_gguf


def spoil_gguf(
    path: Path,
    change: Callable[[str, np.ndarray], np.ndarray | None],
    **added: np.ndarray,
) -> Path:
    """Writes the tiny model as a GGUF whose tensors `change` replaces or, by None, leaves out."""

    class Spoiled(GGUFWriter):
        def add_tensor(self, name: str, tensor: np.ndarray, **kwargs: Any) -> None:
            if (changed := change(name, tensor)) is not None:
                super().add_tensor(name, np.ascontiguousarray(changed), **kwargs)

        def write_header_to_file(self, *args: Any, **kwargs: Any) -> None:
            for name, tensor in added.items():
                super().add_tensor(name.replace("__", "."), tensor)
            super().write_header_to_file(*args, **kwargs)

    return write_gguf(path, tiny_llama(), Spoiled)


@pytest.mark.parametrize(
    ("change", "added", "reason"),
    [
        (
            lambda name, tensor: None if name == "blk.1.ffn_up.weight" else tensor,
            {},
            "model.layers.1.mlp.up_proj.weight is missing from it.gguf",
        ),
        (
            lambda name, tensor: tensor[:32] if name == "blk.0.ffn_up.weight" else tensor,
            {},
            r"up_proj.weight has shape \[32, 32\] in it.gguf, and \[64, 32\] by its metadata",
        ),
        (
            lambda _, tensor: tensor,
            {"blk__0__attn_q__bias": np.ones(32, np.float32)},
            "blk.0.attn_q.bias in it.gguf is no weight of LlamaForCausalLM",
        ),
        (
            lambda _, tensor: tensor,
            {"rope_freqs__weight": np.full(4, 8.0, np.float32)},
            "rope_freqs.weight scales rotary frequencies",
        ),
    ],
)
def test_gguf_that_is_not_the_whole_model_is_refused(
    change: Any,
    added: dict[str, np.ndarray],
    reason: str,
    tmp_path: Path,
) -> None:
    file = spoil_gguf(tmp_path / "it.gguf", change, **added)
    with pytest.raises(ModelSourceError, match=reason) as caught:
        resolve_model(str(file), cache=tmp_path / "cache")
    assert "use the safetensors checkpoint of the model" in str(caught.value)
    assert "\n" not in str(caught.value)
    made = [path.name for path in (tmp_path / "cache" / "models").iterdir()]
    assert all(name.endswith(".lock") for name in made)


def test_an_adapter_beside_a_gguf_is_not_in_it(tmp_path: Path) -> None:
    file = write_gguf(tmp_path / "it.gguf", tiny_llama())
    converted = resolve_model(str(file), cache=tmp_path / "first")
    (tmp_path / "adapter_config.json").write_text('{"base_model_name_or_path": "other"}')
    found = resolve_model(str(file), cache=tmp_path / "cache")
    weights = "model.safetensors"
    assert (found / weights).read_bytes() == (converted / weights).read_bytes()
