"""The base agrees with transformers, and what cannot be served is refused by name."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from adaplex.model.base.loader import load_base
from adaplex.model.errors import UnsupportedModel
from adaplex.model.step.step_context import BaseRows
from rig import ModelRig, prompt
from tiny import ARCHITECTURES, byte_tokenizer, save_tiny


@pytest.mark.parametrize("architecture", sorted(ARCHITECTURES))
def test_fp32_logits_and_tokens_equal_transformers(
    architecture: str, tiny_model: Callable[[str], Path]
) -> None:
    directory = tiny_model(architecture)
    rig = ModelRig(directory)
    oracle = AutoModelForCausalLM.from_pretrained(directory, attn_implementation="eager").eval()
    for length in (3, 30, 290):
        tokens = torch.tensor([prompt(length)])
        with torch.no_grad():
            expected = oracle(tokens).logits[0, -1]
            greedy = oracle.generate(
                tokens,
                attention_mask=torch.ones_like(tokens),
                max_new_tokens=8,
                min_new_tokens=8,
                do_sample=False,
                eos_token_id=None,
            )
        got = rig.prefill(rig.sequence(prompt(length)))[0]
        assert (got - expected).abs().max() < 1e-4
        assert rig.generate([rig.sequence(prompt(length))], 8)[0] == greedy[0, length:].tolist()


@pytest.mark.parametrize(
    ("architecture", "fields", "reason"),
    [
        ("gptj", {"n_embd": 64, "n_head": 4, "n_layer": 2, "rotary_dim": 8}, "attention"),
        ("bloom", {"n_head": 4, "n_layer": 2, "hidden_size": 64}, "attention"),
        ("mamba", {"hidden_size": 64, "num_hidden_layers": 2, "state_size": 4}, "attention"),
    ],
)
def test_unsupported_architectures_are_refused_by_name(
    architecture: str, fields: dict[str, int], reason: str, tmp_path: Path
) -> None:
    config = AutoConfig.for_model(architecture, vocab_size=320, **fields)
    model = AutoModelForCausalLM.from_config(config)
    model.save_pretrained(tmp_path)
    byte_tokenizer().save_pretrained(tmp_path)
    with pytest.raises(UnsupportedModel, match=reason) as error:
        load_base(str(tmp_path), quantization="fp32")
    assert type(model).__name__ in str(error.value)


@pytest.mark.parametrize(
    ("options", "field"),
    [
        ({"quantization": "int3"}, "quantization"),
        ({"dtype": "fp8"}, "dtype"),
        ({"quantization": "bf16", "dtype": "fp32"}, "dtype"),
        ({"device": "cuda"}, "device"),
    ],
)
def test_bad_options_name_the_field(
    options: dict[str, str], field: str, tiny_model: Callable[[str], Path]
) -> None:
    if options.get("device") == "cuda" and torch.cuda.is_available():
        options = {"device": "cuda:99"}
    with pytest.raises(UnsupportedModel, match=f"^{field}"):
        load_base(str(tiny_model("llama")), **options)


def test_tied_embeddings_give_one_head(tiny_model: Callable[[str], Path], tmp_path: Path) -> None:
    directory = save_tiny("llama", tmp_path, tie_word_embeddings=True)
    rig = ModelRig(directory)
    oracle = AutoModelForCausalLM.from_pretrained(directory).eval()
    with torch.no_grad():
        expected = oracle(torch.tensor([prompt(9)])).logits[0, -1]
    assert (rig.prefill(rig.sequence(prompt(9)))[0] - expected).abs().max() < 1e-4
    head = rig.base.module.get_output_embeddings()
    embedding = rig.base.module.get_input_embeddings()
    assert torch.equal(head.backend.dequantize(), embedding.weight)


def test_spec_lists_sites_that_see_one_row_a_token(tiny_model: Callable[[str], Path]) -> None:
    spec = load_base(str(tiny_model("qwen2")), quantization="fp32").spec
    q = spec.modules["model.layers.0.self_attn.q_proj"]
    assert (q.kind, q.in_features, q.out_features, q.has_bias) == ("linear", 64, 64, True)
    assert spec.modules["lm_head"].is_head
    assert spec.biases[q.name].shape == (64,)
    gpt2 = load_base(str(tiny_model("gpt2")), quantization="fp32").spec
    c_attn = gpt2.modules["transformer.h.0.attn.c_attn"]
    assert (c_attn.in_features, c_attn.out_features, c_attn.transposed) == (64, 192, True)
    assert gpt2.modules["transformer.h.0.ln_1"].kind == "norm"
    mixtral = load_base(str(tiny_model("mixtral")), quantization="fp32").spec
    fused = mixtral.modules["model.layers.1.mlp.experts.down_proj"]
    assert (fused.kind, fused.experts, fused.in_features) == ("experts", 4, 128)


def test_spec_lists_what_other_families_touch(tiny_model: Callable[[str], Path]) -> None:
    spec = load_base(str(tiny_model("qwen2")), quantization="fp32").spec
    table = spec.modules["model.embed_tokens"]
    assert (table.kind, table.in_features, table.out_features) == ("embedding", 320, 64)
    assert spec.weight(table.name).shape == (320, 64)
    norm = spec.modules["model.layers.2.input_layernorm"]
    assert (norm.kind, norm.has_bias) == ("norm", False)
    assert spec.weight(norm.name).shape == (64,)
    with pytest.raises(KeyError):
        spec.weight("model.layers.9.input_layernorm")
    assert spec.kv_shapes == ((2, 16, 16),) * 3
    assert (spec.tied, spec.quantization) == (False, "fp32")
    blocks = [m for m in spec.modules.values() if m.kind == "block"]
    assert [(m.name, m.layer, m.part, m.joins) for m in blocks if m.layer == 1] == [
        ("model.layers.1.self_attn", 1, "attention", True),
        ("model.layers.1.mlp", 1, "mlp", True),
    ]


@pytest.mark.parametrize("architecture", ["gemma2", "gpt2"])
def test_bottlenecks_fit_only_behind_blocks_that_join_the_stream(
    architecture: str, tiny_model: Callable[[str], Path]
) -> None:
    spec = load_base(str(tiny_model(architecture)), quantization="fp32").spec
    blocks = [m for m in spec.modules.values() if m.kind == "block"]
    assert {m.layer for m in blocks if m.part == "attention"} == {0, 1, 2}
    assert not any(m.joins for m in blocks)


def test_nf4_without_kernels_is_reported_in_one_line(
    tiny_model: Callable[[str], Path], tmp_path: Path
) -> None:
    lines: list[str] = []
    load_base(str(tiny_model("llama")), quantization="nf4", dtype="fp32", progress=lines.append)
    assert sum("no nf4 kernel" in line for line in lines) == 1
    odd = save_tiny("llama", tmp_path, intermediate_size=80)
    lines.clear()
    load_base(str(odd), quantization="nf4", progress=lines.append)
    (line,) = [line for line in lines if "no nf4 kernel" in line]
    assert "21 linears" in line


def test_int4_of_another_width_is_reported_in_one_line(tmp_path: Path) -> None:
    lines: list[str] = []
    odd = save_tiny("llama", tmp_path, intermediate_size=80)
    base = load_base(str(odd), quantization="int4-group", progress=lines.append)
    (line,) = [line for line in lines if "group size" in line]
    assert line.startswith("3 of 21 linears")
    assert len(base.backends["model.layers.0.mlp.down_proj"].dequantize().unique()) < 64 * 3 * 16


def test_a_base_only_step_runs_no_adapter_code(
    tiny_model: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    rig = ModelRig(tiny_model("llama"))
    expected = rig.prefill(rig.sequence(prompt(9)))

    def touched(*_: object) -> None:
        raise AssertionError("adapter code ran")

    for method in ("linear", "norm", "embedding", "block"):
        monkeypatch.setattr(BaseRows, method, touched)
    assert torch.equal(rig.prefill(rig.sequence(prompt(9))), expected)


def test_digest_tells_weights_and_quantization_apart(
    tiny_model: Callable[[str], Path], tmp_path: Path
) -> None:
    directory = tiny_model("llama")
    digests = {
        load_base(str(directory), quantization="fp32").spec.digest,
        load_base(str(directory), quantization="bf16").spec.digest,
        load_base(str(save_tiny("llama", tmp_path, seed=1)), quantization="fp32").spec.digest,
    }
    assert len(digests) == 3
    assert load_base(str(directory), quantization="fp32").spec.digest in digests
