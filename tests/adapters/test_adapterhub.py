"""AdapterHub's files: what is read of them.

Their logits are held to the library's in tests/model/test_adapterhub_oracle.py.
"""

from __future__ import annotations

import pytest
import torch

from adaplex.adapters.checkpoint import Checkpoint
from adaplex.adapters.errors import AdapterInvalid
from adaplex.adapters.program.primitives import Activation, Reads
from adapters.adapterhub_files import bottleneck, changed, lower, make_base, outer, read, retensored


@pytest.mark.parametrize(
    ("name", "family", "reads", "activation"),
    [
        ("houlsby", "bottleneck", Reads.OUTPUT, Activation.SILU),
        ("pfeiffer", "bottleneck", Reads.SUM, Activation.GELU),
        ("parallel", "bottleneck", Reads.RESIDUAL, Activation.RELU),
        ("plus", "bottleneck", Reads.SUM, Activation.GELU),
        ("learned", "bottleneck", Reads.RESIDUAL, Activation.GELU_TANH),
        ("mam", "hybrid", Reads.RESIDUAL, Activation.RELU),
    ],
)
def test_flags_decide_what_a_bottleneck_reads(
    name: str, family: str, reads: Reads, activation: Activation
) -> None:
    program = lower(read(name))
    found = bottleneck(program, "model.layers.1.mlp")
    assert (program.family, found.reads, found.activation) == (family, reads, activation)


def test_places_widths_and_layers_are_those_of_the_config() -> None:
    widths = {m.module: len(m.bottleneck.down) for m in lower(read("pfeiffer")).modules
              if m.bottleneck is not None}  # fmt: skip
    assert widths == {"model.layers.0.mlp": 16, "model.layers.1.mlp": 4}
    assert [m.module for m in lower(read("learned")).modules] == [
        "model.layers.1.mlp",
        "model.layers.1.self_attn",
    ]
    united = {m.module: m.primitives for m in lower(read("union")).modules}
    assert united["model.layers.0.self_attn"] == united["model.layers.1.mlp"] == ("bottleneck",)
    assert united["model.layers.0.self_attn.q_proj"] == ("low-rank",)


@pytest.mark.parametrize(
    ("architecture", "name"), [("llama", "mlp.down_proj"), ("qwen2", "mlp.up_proj")]
)
def test_intermediate_is_another_projection_in_the_librarys_own_models(
    architecture: str, name: str
) -> None:
    program = lower(read("lora", architecture), make_base(architecture))
    assert f"model.layers.0.{name}" in {m.module for m in program.modules}


def test_keys_without_the_models_prefix_are_the_same() -> None:
    found = read("houlsby")
    tensors = {key.removeprefix("model."): tensor for key, tensor in found.tensors.items()}
    for one, other in zip(
        lower(found).modules, lower(Checkpoint(found.config, tensors)).modules, strict=True
    ):
        assert one.module == other.module
        assert all(
            torch.equal(a, b) for (_, a), (_, b) in zip(one.tensors(), other.tensors(), strict=True)
        )


def test_the_scale_of_old_versions_is_1() -> None:
    scales = {
        version: lower(outer("lora", version=version)).modules[0].scale
        for version in ("adapters.1.0.1", "adapters.1.1.0", "adapters.1.3.0")
    }
    assert scales == {"adapters.1.0.1": 1.0, "adapters.1.1.0": 1.5, "adapters.1.3.0": 1.5}


def test_copies_of_a_prefix_are_taken_when_they_are_equal() -> None:
    key = "model.prefix_tuning.prefix_tunings.mam.self_prefix.wte.weight"
    copy = "model.layers.1.self_attn.prefix_tuning.pool.prefix_tunings.mam.self_prefix.wte.weight"
    weight = read("mam").tensors[key]
    assert lower(retensored("mam", {copy: weight})).prefix_tokens == 5
    with pytest.raises(
        AdapterInvalid, match=r"self_prefix\.wte\.weight: differs from prefix_tuning\."
    ):
        lower(retensored("mam", {copy: weight + 1}))


def test_identity_is_what_changes_the_answer() -> None:
    digest = lower(read("pfeiffer")).digest
    same = [
        changed("pfeiffer", dropout=0.5),
        changed("pfeiffer", init_weights="houlsby", phm_dim=2, cross_adapter=True),
        changed("pfeiffer", drop="scaling"),
        changed("pfeiffer", reduction_factor={"0": 4, "1": 16}),
        changed("pfeiffer", original_ln_after=False, residual_before_ln=False),
        outer("pfeiffer", model_name="elsewhere", model_class="LlamaModel"),
    ]
    assert {lower(found).digest for found in same} == {digest}
    other = [
        changed("pfeiffer", scaling=2.0),
        changed("pfeiffer", non_linearity="relu"),
        changed("pfeiffer", original_ln_before=False),
        changed("pfeiffer", is_parallel=True),
    ]
    assert len({digest, *(lower(found).digest for found in other)}) == 5
