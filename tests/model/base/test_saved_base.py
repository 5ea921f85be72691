"""A base that was saved answers with the bits of the one that was quantized."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from adaplex.model.base import build_model
from adaplex.model.base.loader import load_base
from adaplex.model.base.saved_base import ALIGNMENT, SavedBase
from adaplex.model.modules.hooks import AdaptedLinear
from model.base.saved_bases import check_equal
from rig import ModelRig, prompt
from tiny import ARCHITECTURES, save_tiny

KEPT = [
    *(
        (quantization, native)
        for quantization in ("nf4", "int4-group", "bf16", "fp32")
        for native in (True, False)
    ),
    ("int8", True),
]


@pytest.fixture
def no_checkpoint(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """After it is called, reading a checkpoint fails the test."""

    def forbid() -> None:
        def read(*_: Any, **__: Any) -> None:
            raise AssertionError("the checkpoint was read")

        monkeypatch.setattr(build_model.AutoModelForCausalLM, "from_pretrained", read)
        monkeypatch.setattr(build_model, "probe", read)

    return forbid


def check_same_bits(restored: ModelRig, made: ModelRig) -> None:
    """Asserts that a prompt, and steps after it, give the same bits."""
    for length in (3, 70):
        sequences = [rig.sequence(prompt(length)) for rig in (restored, made)]
        assert torch.equal(restored.prefill(sequences[0]), made.prefill(sequences[1]))
    generated = [
        rig.generate([rig.sequence(prompt(length, 1)) for length in (5, 40)], 6)
        for rig in (restored, made)
    ]
    assert generated[0] == generated[1]


@pytest.mark.slow
@pytest.mark.parametrize(("quantization", "native"), KEPT)
@pytest.mark.parametrize("architecture", sorted(ARCHITECTURES))
def test_the_saved_base_is_the_quantized_one(
    architecture: str,
    quantization: str,
    native: bool,
    tiny_model: Callable[[str], Path],
    tmp_path: Path,
    no_checkpoint: Callable[[], None],
) -> None:
    kept = {"quantization": quantization, "native": native, "saved": tmp_path}
    made = ModelRig(tiny_model(architecture), **kept)
    no_checkpoint()
    restored = ModelRig(tiny_model(architecture), **kept)
    check_equal(restored.base, made.base)
    check_same_bits(restored, made)


def test_tied_embeddings_are_tied_again(tmp_path: Path, no_checkpoint: Callable[[], None]) -> None:
    directory = save_tiny("llama", tmp_path / "tied", tie_word_embeddings=True)
    made = ModelRig(directory, "nf4", saved=tmp_path / "saved")
    no_checkpoint()
    restored = ModelRig(directory, "nf4", saved=tmp_path / "saved")
    check_equal(restored.base, made.base)
    check_same_bits(restored, made)


def test_parameters_under_two_names_are_one_again(tmp_path: Path) -> None:
    model = nn.Module()
    model.add_module("a", nn.LayerNorm(5))
    model.add_module("b", nn.LayerNorm(5))
    model.b.weight = model.a.weight  # type: ignore[union-attr]
    base = SavedBase(tmp_path, {"of": "two norms"})
    base.write(model, build_model.Probe())
    with torch.device("meta"):
        empty = nn.Module()
        empty.add_module("a", nn.LayerNorm(5))
        empty.add_module("b", nn.LayerNorm(5))
    contents = base.read()
    assert contents is not None
    contents.fill(empty)
    assert empty.a.weight is empty.b.weight  # type: ignore[union-attr]
    assert empty.a.bias is not empty.b.bias  # type: ignore[union-attr]
    assert torch.equal(empty.b.weight, model.a.weight)  # type: ignore[union-attr, arg-type]


def test_large_tensors_stay_in_the_file(tiny_model: Callable[[str], Path], tmp_path: Path) -> None:
    load_base(str(tiny_model("llama")), saved=tmp_path)
    base = load_base(str(tiny_model("llama")), saved=tmp_path)
    (file,) = tmp_path.glob("*.safetensors")
    table: torch.Tensor = base.module.get_input_embeddings().weight  # type: ignore[operator]
    mapped = [
        tuple(int(end, 16) for end in line.split()[0].split("-"))
        for line in Path("/proc/self/maps").read_text().splitlines()
        if line.endswith(str(file))
    ]
    assert any(start <= table.data_ptr() < stop for start, stop in mapped)
    assert table.data_ptr() % ALIGNMENT == 0
    assert file.stat().st_mode & 0o777 == 0o644


def test_what_a_base_is_made_of_names_its_file(tmp_path: Path) -> None:
    saved = tmp_path / "saved"
    names = []
    int4 = {"quantization": "int4-group"}
    for options in (
        {},
        {"quantization": "int8"},
        {"native": False},
        {"dtype": "fp32"},
        int4,
        int4 | {"group_size": 16},
    ):
        directory = save_tiny("llama", tmp_path / "tiny")
        load_base(str(directory), saved=saved, **options)  # type: ignore[arg-type]
        names.append(len(list(saved.glob("*.safetensors"))))
    load_base(str(save_tiny("llama", tmp_path / "tiny", seed=1)), saved=saved)
    names.append(len(list(saved.glob("*.safetensors"))))
    assert names == [1, 2, 3, 4, 5, 6, 7]


def test_nothing_is_saved_unless_asked(
    tiny_model: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def write(*_: Any) -> None:
        raise AssertionError("saved")

    monkeypatch.setattr(SavedBase, "write", write)
    base = load_base(str(tiny_model("llama")))
    assert any(isinstance(module, AdaptedLinear) for module in base.module.modules())
