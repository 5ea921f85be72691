"""Bases that cannot be served are refused by name, from the first bytes of their files."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from adaplex.model.base.checkpoint_files import INDEX, check_model_folder
from adaplex.model.base.loader import load_base
from adaplex.model.base.source import check_model
from adaplex.model.errors import ModelSourceError, UnsupportedModel
from tiny import save_tiny


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return save_tiny("llama", tmp_path / "model")


def edit_config(model: Path, **changes: object) -> None:
    path = model / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def refusal(model: Path) -> str:
    with pytest.raises(ModelSourceError) as caught:
        check_model_folder("mine", model)
    with pytest.raises(ModelSourceError):
        load_base(str(model), quantization="fp32", native=False)
    message = str(caught.value)
    assert message.startswith("model 'mine': ")
    assert "\n" not in message
    return message


def test_a_whole_folder_is_accepted(model: Path) -> None:
    check_model_folder("mine", model)
    check_model(str(model))


def test_a_checkpoint_of_bitsandbytes(model: Path) -> None:
    edit_config(model, quantization_config={"quant_method": "bitsandbytes", "load_in_4bit": True})
    assert "quantized by bitsandbytes; use the original checkpoint" in refusal(model)


def test_a_git_lfs_pointer(model: Path) -> None:
    pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:a1\nsize 97728\n"
    (model / "model.safetensors").write_bytes(pointer)
    assert "model.safetensors is a Git LFS pointer, not weights; run git lfs" in refusal(model)


@pytest.mark.parametrize("keep", [0, 7, 100])
def test_weights_that_are_cut_off(model: Path, keep: int) -> None:
    weights = model / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:keep])
    assert f"cut off: it has {keep} bytes" in refusal(model)


def test_a_missing_shard(model: Path) -> None:
    tensors = load_file(model / "model.safetensors")
    (model / "model.safetensors").unlink()
    first, second = (f"model-0000{n}-of-00002.safetensors" for n in (1, 2))
    half = dict(list(tensors.items())[:10])
    save_file(half, model / first, {"format": "pt"})
    files = {name: first if name in half else second for name in tensors}
    (model / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": files}))
    assert f"lacks {second}, which {INDEX} lists" in refusal(model)
    (model / INDEX).write_text("[]")
    assert f"{INDEX} cannot be read" in refusal(model)


def test_no_tokenizer(model: Path) -> None:
    for path in (*model.glob("tok*"), *model.glob("*.jinja")):
        path.unlink()
    assert "has no tokenizer (tokenizer.json or another)" in refusal(model)


@pytest.mark.parametrize(("text", "reason"), [("{", "cannot be read"), ("[]", "is a list")])
def test_a_broken_config(model: Path, text: str, reason: str) -> None:
    (model / "config.json").write_text(text)
    assert f"config.json {reason}" in refusal(model)


def test_every_reason_is_given(model: Path) -> None:
    for path in model.iterdir():
        path.unlink()
    message = refusal(model)
    assert "no config.json; " in message
    assert "no *.safetensors (pickles are not read); " in message
    assert "no tokenizer" in message


def test_a_model_with_code_of_its_own_is_one_line(model: Path) -> None:
    auto = {"AutoConfig": "a.C", "AutoModelForCausalLM": "b.M"}
    edit_config(model, model_type="acme", auto_map=auto)
    check_model_folder("mine", model)  # only transformers has the list of architectures
    with pytest.raises(UnsupportedModel, match="its config cannot be read: ") as caught:
        load_base(str(model), quantization="fp32", native=False)
    assert "\n" not in str(caught.value)


def test_a_broken_tokenizer_is_one_line(model: Path) -> None:
    (model / "tokenizer.json").write_text("{}")
    with pytest.raises(UnsupportedModel, match="its tokenizer cannot be read: "):
        load_base(str(model), quantization="fp32", native=False)


def test_a_slip_in_the_name_of_the_default_model() -> None:
    with pytest.raises(ModelSourceError, match=r"did you mean smollm2-135m-instruct\?"):
        check_model("SmolLM2-135M-instuct")
    for fetched in ("smollm2-135m-instruct", "org/name@v1"):
        check_model(fetched)
