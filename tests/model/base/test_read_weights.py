"""A base is read whole: weights that are missing, left over or of another form are refused by name,
and an adapter beside the base is not part of it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from adaplex.model.base.checkpoint_files import ADAPTER_CONFIG, INDEX, WEIGHTS, check_model_folder
from adaplex.model.base.loader import load_base
from adaplex.model.errors import ModelSourceError
from model.base.saved_bases import state_of
from tiny import save_tiny

UP = "model.layers.1.mlp.up_proj.weight"
EXPERT = "model.layers.1.block_sparse_moe.experts.2.w1.weight"
Change = Callable[[dict[str, Tensor]], object]


def edit(model: Path, change: Change) -> Path:
    tensors = load_file(model / WEIGHTS)
    change(tensors)
    save_file(tensors, model / WEIGHTS, {"format": "pt"})
    return model


def load(model: Path) -> tuple[dict[str, Tensor], list[str]]:
    """Returns the tensors of a base, and the lines of its loading."""
    lines: list[str] = []
    base = load_base(str(model), quantization="fp32", native=False, progress=lines.append)
    tensors = state_of(base.module)
    for name, backend in base.backends.items():
        tensors |= {f"{name}/{part}": tensor for part, tensor in backend.tensors().items()}
    return tensors, lines


def refusal(model: Path) -> str:
    with pytest.raises(ModelSourceError) as caught:
        load(model)
    message = str(caught.value)
    assert message.startswith(f"model {str(model)!r}: ")
    assert message.endswith(
        "copy or export the checkpoint again, with the config.json that belongs to it"
    )
    assert "\n" not in message
    return message


def test_missing_weights(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model = edit(save_tiny("llama", tmp_path), lambda tensors: tensors.pop(UP))
    assert f"{UP} is missing from {WEIGHTS}; " in refusal(model)
    assert "LOAD REPORT" not in caplog.text
    edit(model, lambda t: [t.pop(name) for name in list(t) if "layers.0" in name])
    assert "model.layers.0.input_layernorm.weight is missing" in (message := refusal(model))
    assert "(and 7 more)" in message


def test_a_missing_output_layer_that_is_not_tied(tmp_path: Path) -> None:
    model = edit(
        save_tiny("llama", tmp_path, tie_word_embeddings=False), lambda t: t.pop("lm_head.weight")
    )
    assert f"lm_head.weight is missing from {WEIGHTS}" in refusal(model)


def test_a_tied_output_layer_may_be_absent(tmp_path: Path) -> None:
    model = save_tiny("llama", tmp_path, tie_word_embeddings=True)
    assert "lm_head.weight" not in load_file(model / WEIGHTS)
    load(model)
    message_of_both = edit(model, lambda t: t.pop("model.embed_tokens.weight"))
    assert "embed_tokens.weight is missing" in refusal(message_of_both)


@pytest.mark.parametrize(
    ("name", "tensor"),
    [
        ("model.layers.0.self_attn.q_proj.bias", torch.ones(64)),
        ("model.layers.3.input_layernorm.weight", torch.ones(64)),
        ("base_model.model.lm_head.weight", torch.ones(3, 3)),
        ("model.layers.0.mlp.up_proj.weight_scale", torch.ones(1)),
    ],
)
def test_weights_that_are_left_over(name: str, tensor: Tensor, tmp_path: Path) -> None:
    model = edit(save_tiny("llama", tmp_path), lambda t: t.update({name: tensor}))
    assert f"{name} in {WEIGHTS} is no weight of LlamaForCausalLM" in refusal(model)


@pytest.mark.parametrize(
    "name",
    [
        "model.layers.0.self_attn.rotary_emb.inv_freq",
        "vision_tower.blocks.0.weight",
        "model.visual.merger.weight",
        "multi_modal_projector.linear.bias",
        "mtp.layers.0.weight",
    ],
)
def test_known_tensors_without_effect_are_logged(name: str, tmp_path: Path) -> None:
    model = save_tiny("llama", tmp_path)
    expected, _ = load(model)
    found, lines = load(edit(model, lambda t: t.update({name: torch.ones(8)})))
    assert f"not used, as the text model has no such part: {name}" in lines
    assert all(torch.equal(found[each], tensor) for each, tensor in expected.items())


def test_another_shape_than_the_config_gives(tmp_path: Path) -> None:
    model = edit(save_tiny("llama", tmp_path), lambda t: t.update({UP: t[UP][:100].clone()}))
    expected = f"{UP} has shape [100, 64] in {WEIGHTS}, and [128, 64] by config.json"
    assert expected in refusal(model)


@pytest.mark.parametrize("kind", [torch.int8, torch.float8_e4m3fn])
def test_quantized_weights_without_a_config_of_it(kind: torch.dtype, tmp_path: Path) -> None:
    model = edit(save_tiny("llama", tmp_path), lambda t: t.update({UP: t[UP].to(kind)}))
    assert f"{UP} has type " in (message := refusal(model))
    assert "config.json has no quantization_config" in message


def test_a_weight_under_two_names(tmp_path: Path) -> None:
    inner = UP.removeprefix("model.")
    model = edit(save_tiny("llama", tmp_path), lambda t: t.update({inner: t[UP] + 1}))
    assert f"{inner} and {UP} are the same weight" in refusal(model)


def test_an_expert_is_missing(tmp_path: Path) -> None:
    model = edit(save_tiny("mixtral", tmp_path), lambda t: t.pop(EXPERT))
    assert f"{EXPERT} is missing" in refusal(model)
    # as many experts as before, under other numbers
    gone = EXPERT.replace("experts.2", "experts.7")
    edit(model, lambda t: t.update({gone: t[EXPERT.replace("experts.2", "experts.1")] + 1}))
    assert f"{EXPERT} is missing" in refusal(model)


def test_an_expert_of_another_shape(tmp_path: Path) -> None:
    model = edit(
        save_tiny("mixtral", tmp_path), lambda t: t.update({EXPERT: t[EXPERT][:100].clone()})
    )
    assert f"{EXPERT} has shape [100, 64], and expert 0 [128, 64]" in refusal(model)


def shards(model: Path) -> dict[str, str]:
    """Splits a model's weights into two shards with an index, which is returned."""
    tensors = load_file(model / WEIGHTS)
    (model / WEIGHTS).unlink()
    parts = [dict(list(tensors.items())[start::2]) for start in (0, 1)]
    listed = {}
    for number, part in enumerate(parts, 1):
        file = f"model-0000{number}-of-00002.safetensors"
        save_file(part, model / file, {"format": "pt"})
        listed |= dict.fromkeys(part, file)
    write_index(model, listed)
    return listed


def write_index(model: Path, listed: dict[str, str]) -> None:
    (model / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": listed}))


def test_shards_are_read_by_their_index(tmp_path: Path) -> None:
    model = save_tiny("llama", tmp_path)
    expected, _ = load(model)
    listed = shards(model)
    save_file({UP: torch.zeros(128, 64)}, model / "old.safetensors")  # read by nobody
    found, lines = load(model)
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    assert f"not part of the base, and not read: old.safetensors in {model}" in lines

    write_index(model, {name: file for name, file in listed.items() if file != listed[UP]})
    assert (
        f" is missing from {listed[next(n for n in listed if listed[n] != listed[UP])]}"
        in refusal(model)
    )


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda listed: listed.pop(UP), f"has {UP}, which {INDEX} places nowhere"),
        (lambda listed: listed.update(more=listed[UP]), f"lacks more, which {INDEX} places there"),
        (
            lambda listed: listed.update({UP: next(f for f in listed.values() if f != listed[UP])}),
            f"has {UP}, which {INDEX} places in model-",
        ),
        (lambda listed: listed.update({UP: "../x.safetensors"}), "is no *.safetensors beside it"),
        (lambda listed: listed.update({UP: "gone.safetensors"}), "lacks gone.safetensors, which"),
    ],
)
def test_an_index_of_other_shards(change: Change, reason: str, tmp_path: Path) -> None:
    model = save_tiny("llama", tmp_path)
    listed = shards(model)
    change(listed)  # type: ignore[arg-type]
    write_index(model, listed)
    with pytest.raises(ModelSourceError) as caught:
        check_model_folder("mine", model)
    assert reason in str(caught.value)


def test_an_adapter_beside_the_base_is_not_attached(tmp_path: Path) -> None:
    model = save_tiny("llama", tmp_path / "model")
    expected, _ = load(model)
    tuned = get_peft_model(
        AutoModelForCausalLM.from_pretrained(model),
        LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=False),
    )
    tuned.save_pretrained(tmp_path / "adapter")
    for file in (tmp_path / "adapter").glob("adapter_*"):
        file.rename(model / file.name)
    found, lines = load(model)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    left = f"{ADAPTER_CONFIG}, adapter_model.safetensors"
    assert f"not part of the base, and not read: {left} in {model}" in lines


def test_a_folder_with_an_adapter_only(tmp_path: Path) -> None:
    (tmp_path / ADAPTER_CONFIG).write_text('{"base_model_name_or_path": "org/name"}')
    with pytest.raises(ModelSourceError, match=r"holds an adapter .* adaplex adapters push"):
        check_model_folder("mine", tmp_path)
