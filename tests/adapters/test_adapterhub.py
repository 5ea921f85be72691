"""AdapterHub's files: what is read of them, what is refused, and how they come in.

Their logits are held to the library's in tests/model/test_adapterhub_oracle.py.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from adaplex.adapters import formats
from adaplex.adapters.base_match import mismatches
from adaplex.adapters.base_spec import BaseModule, BaseSpec
from adaplex.adapters.checkpoint import (
    ADAPTERHUB_WEIGHTS,
    CONFIG,
    WEIGHTS,
    Checkpoint,
    read_checkpoint,
)
from adaplex.adapters.errors import AdapterInvalid, AdapterTooLarge
from adaplex.adapters.formats.hybrid import join
from adaplex.adapters.limits import AdapterLimits
from adaplex.adapters.primitives import Activation, Bottleneck, Reads
from adaplex.adapters.program import AdapterProgram
from adaplex.adapters.sources.transfer import choose_files
from adaplex.client.errors import InvalidArgument
from adaplex.client.upload import AdapterFiles
from adapters.handmade import UPLOAD, make_importer, make_registry

FIXTURES = Path(__file__).parent.parent / "adapterhub" / "fixtures"
LLAMA = FIXTURES / "llama"
LIMITS = AdapterLimits()
HIDDEN, HALF, LAYERS = 64, 32, 2


def make_base(kind: str = "llama", **fields: Any) -> BaseSpec:
    """The shapes of the fixtures' models; every weight is 1."""
    modules: list[BaseModule] = []
    for layer in range(LAYERS):
        place = f"model.layers.{layer}"
        outputs = {"q": HIDDEN, "k": HALF, "v": HALF}
        modules += [
            *(
                BaseModule(f"{place}.self_attn.{n}_proj", "linear", HIDDEN, outputs[n])
                for n in "qkv"
            ),
            *(
                BaseModule(f"{place}.mlp.{n}_proj", "linear", HIDDEN, HIDDEN)
                for n in ("up", "down")
            ),
            BaseModule(
                f"{place}.self_attn", "block", HIDDEN, HIDDEN, layer=layer, part="attention"
            ),
            BaseModule(f"{place}.mlp", "block", HIDDEN, HIDDEN, layer=layer, part="mlp"),
        ]
    by_name = {module.name: module for module in modules}
    shape: dict[str, Any] = {"kv_shapes": ((2, 16, 16),) * LAYERS, "rotary": torch.ones(8)}

    def ones(name: str) -> Tensor:
        return torch.ones(by_name[name].out_features, by_name[name].in_features)

    return BaseSpec("org/tiny", "digest", kind, by_name, weight=ones, **(shape | fields))


BASE = make_base()


def read(name: str, architecture: str = "llama") -> Checkpoint:
    return read_checkpoint(FIXTURES / architecture / name, LIMITS)


def lower(found: Checkpoint, base: BaseSpec = BASE) -> AdapterProgram:
    return formats.lower(found, base, LIMITS)


def changed(name: str, *, drop: str = "", **fields: Any) -> Checkpoint:
    """A fixture with changes to the method's config, or without a field of it."""
    found = read(name)
    config = {**found.config["config"], **fields}
    config.pop(drop, None)
    return Checkpoint({**found.config, "config": config}, found.tensors)


def outer(name: str, /, **fields: Any) -> Checkpoint:
    found = read(name)
    return Checkpoint({**found.config, **fields}, found.tensors)


def retensored(name: str, changes: dict[str, Tensor | None]) -> Checkpoint:
    """A fixture with tensors added, replaced, or taken out."""
    found = read(name)
    tensors = {**found.tensors, **{k: v for k, v in changes.items() if v is not None}}
    kept = {k: v for k, v in tensors.items() if changes.get(k, v) is not None}
    return Checkpoint(found.config, kept)


def bottleneck(program: AdapterProgram, module: str) -> Bottleneck:
    found = {m.module: m.bottleneck for m in program.modules}[module]
    assert found is not None
    return found


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
    with pytest.raises(AdapterInvalid, match=r"self_prefix\.wte\.weight: differs from what"):
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


UP = "model.layers.0.output_adapters.adapters.pfeiffer.adapter_up.weight"
UNITED = read("mam").config["config"]["configs"]
METHOD: dict[str, tuple[str, dict[str, Any], str, str]] = {
    "layer norm before": ("pfeiffer", {"ln_before": True}, "ln_before", "statistics"),
    "layer norm after": ("pfeiffer", {"ln_after": True}, "ln_after", "layer norm"),
    "gates": ("pfeiffer", {"use_gating": True}, "use_gating", "gates"),
    "gates of LoRA": ("lora", {"use_gating": True}, "use_gating", "gates"),
    "Compacter": ("pfeiffer", {"phm_layer": True}, "phm_layer", "hypercomplex"),
    "invertible": ("pfeiffer", {"inv_adapter": "nice"}, "inv_adapter", "invertible"),
    "VeRA": ("lora", {"vera_d": 0.1}, "vera_d", "PEFT's format"),
    "unknown": ("pfeiffer", {"speed": 3}, "speed", "is not a field of AdapterHub's bottlenecks"),
    "residual twice": (
        "pfeiffer", {"residual_before_ln": False}, "original_ln_before", "adds it twice",
    ),
    "residual lost": (
        "houlsby", {"original_ln_after": False}, "original_ln_before", "loses what",
    ),
    "residual lost beside": (
        "parallel", {"original_ln_after": False}, "original_ln_before", "loses what",
    ),
    "residual of another norm": (
        "pfeiffer", {"residual_before_ln": "post_add"}, "original_ln_before", "post_add",
    ),
    "no flag": ("pfeiffer", {"is_parallel": "yes"}, "is_parallel", "true or false"),
    "activation": ("pfeiffer", {"non_linearity": "mish"}, "non_linearity", "'mish' is not served"),
    "no activation": ("pfeiffer", {"non_linearity": 3}, "non_linearity", "is not served"),
    "scaling": ("pfeiffer", {"scaling": "large"}, "scaling", "a number, or one of learned"),
    "endless scaling": ("pfeiffer", {"scaling": float("inf")}, "scaling", "a number"),
    "factor": ("pfeiffer", {"reduction_factor": 0}, "reduction_factor", "at least 0.001"),
    "no factor": ("pfeiffer", {"reduction_factor": "16"}, "reduction_factor", "a number"),
    "a layer's factor": (
        "pfeiffer", {"reduction_factor": {"0": 4}}, "reduction_factor", "says nothing of layer 1",
    ),
    "layers": ("pfeiffer", {"leave_out": [1.5]}, "leave_out", "a list of layers"),
    "rank": ("lora", {"r": 0}, "r", "a positive integer"),
    "alpha": ("lora", {"alpha": -1}, "alpha", "a positive number"),
    "mode": ("lora", {"composition_mode": "sub"}, "composition_mode", "add or scale"),
    "rank of (IA)^3": ("ia3", {"r": 2}, "r", "1, without use_dora, to scale"),
    "matrices": ("lora", {"attn_matrices": ["o"]}, "attn_matrices", "a list of q, k and v"),
}  # fmt: skip


@pytest.mark.parametrize("case", METHOD)
def test_what_a_method_cannot_be_served_with_is_refused_by_field(case: str) -> None:
    name, fields, where, reason = METHOD[case]
    with pytest.raises(AdapterInvalid) as caught:
        lower(changed(name, **fields))
    assert caught.value.field == f"config.{where}"
    assert reason in caught.value.refusals[0].reason


PREFIX: dict[str, tuple[dict[str, Any], str, str]] = {
    "gates": ({"use_gating": True}, "use_gating", "gates"),
    "length": ({"prefix_length": 0}, "prefix_length", "a positive integer"),
    "activation": ({"non_linearity": "mish"}, "non_linearity", "must be one of"),
    "layers": ({"leave_out": [0]}, "leave_out", "leaves layers without"),
}


@pytest.mark.parametrize("case", PREFIX)
def test_fields_of_a_part_are_refused_by_their_place(case: str) -> None:
    fields, where, reason = PREFIX[case]
    with pytest.raises(AdapterInvalid) as caught:
        lower(changed("mam", configs=[UNITED[0] | fields, UNITED[1]]))
    assert caught.value.field == f"config.configs[0].{where}"
    assert reason in caught.value.refusals[0].reason


@pytest.mark.parametrize("fields", [{"rotary": None}, {"kv_shapes": ((2, 16, 16), (2, 8, 8))}])
def test_a_prefix_needs_keys_that_can_be_turned(fields: dict[str, Any]) -> None:
    with pytest.raises(AdapterInvalid, match="needs layers of one shape with rotary keys"):
        lower(read("mam"), make_base(**fields))


OUTER: dict[str, tuple[Checkpoint, str, str]] = {
    "model": (outer("pfeiffer", model_type="bert"), "model_type", "served are llama, mistral"),
    "odd model": (outer("pfeiffer", model_type=["llama"]), "model_type", "is not served"),
    "other model": (outer("pfeiffer", model_type="qwen2"), "model_type", "org/tiny is llama"),
    "name": (outer("pfeiffer", name=None), "name", "must be the name"),
    "version": (outer("pfeiffer", version="3.2.1"), "version", "adapters.1.3.0"),
    "field": (outer("pfeiffer", peft_type="ADAPTERHUB"), "peft_type", "is not a field"),
    "no union": (changed("mam", configs={}), "config.configs", "a list of objects"),
    "no part": (changed("mam", configs=[UNITED[0], 3]), "config.configs[1]", "an object"),
    "method": (
        changed("pfeiffer", architecture="reft"),
        "config.architecture",
        "it needs interventions",
    ),
    "prompt tuning": (
        changed("pfeiffer", architecture="prompt_tuning"),
        "config.architecture",
        "for no model served here",
    ),
    "odd method": (changed("pfeiffer", architecture=[1]), "config.architecture", "is not served"),
    "nothing": (changed("pfeiffer", leave_out=[0, 1]), "layers.0.output_adapters", "is there"),
    "place": (
        changed("pfeiffer", mh_adapter=True),
        "layers.0.attention_adapters",
        "has no tensors",
    ),
    "place twice": (
        changed("mam", configs=[UNITED[1], UNITED[1]]),
        "layers.0.output_adapters",
        "has no tensors",
    ),
    "missing tensor": (
        retensored("pfeiffer", {UP: None}),
        "layers.0.output_adapters.adapter_up.weight",
        "is missing",
    ),
    "shape": (
        retensored("pfeiffer", {UP: torch.ones(3, 3)}),
        "layers.0.output_adapters.adapter_up.weight",
        "has shape [3, 3], expected [64, 16]",
    ),
    "other tensor": (
        retensored("pfeiffer", {UP.replace("up", "gate"): torch.ones(1)}),
        "layers.0.output_adapters.adapter_gate.weight",
        "has no place",
    ),
    "other adapter": (
        retensored("pfeiffer", {UP.replace("pfeiffer", "other"): torch.ones(1)}),
        UP.replace("pfeiffer", "other"),
        "is not of the adapter 'pfeiffer'",
    ),
    "given twice": (
        retensored("pfeiffer", {UP.removeprefix("model."): torch.ones(1)}),
        UP.removeprefix("model."),
        "is given twice",
    ),
    "odd tensor": (retensored("pfeiffer", {"lone": torch.ones(1)}), "lone", "is there"),
}


@pytest.mark.parametrize("case", OUTER)
def test_what_does_not_fit_is_refused_by_name(case: str) -> None:
    found, where, reason = OUTER[case]
    with pytest.raises(AdapterInvalid) as caught:
        lower(found)
    assert caught.value.field == where
    assert reason in caught.value.refusals[0].reason


def test_ranks_are_limited() -> None:
    with pytest.raises(AdapterTooLarge, match="r is 4, the limit is 3"):
        formats.lower(read("lora"), BASE, AdapterLimits(max_rank=3))


def test_a_base_without_the_blocks_is_refused_by_module() -> None:
    linears = {name: module for name, module in BASE.modules.items() if module.kind == "linear"}
    with pytest.raises(AdapterInvalid, match="the base org/tiny has no such module"):
        lower(read("pfeiffer"), BaseSpec("org/tiny", "digest", "llama", linears))


def test_magnitudes_need_the_weight() -> None:
    unknown = BaseSpec("org/tiny", "digest", "llama", BASE.modules)
    with pytest.raises(AdapterInvalid, match="DoRA needs the base's weight") as caught:
        lower(read("dora"), unknown)
    assert caught.value.field == "model.layers.0.self_attn.q_proj"


# The files on their way in.


def test_a_directory_of_the_library_comes_in_by_the_importer(tmp_path: Path) -> None:
    registry = make_registry(tmp_path / "store", BASE)
    importer = make_importer(registry, [FIXTURES])
    done = importer.load(str(LLAMA / "houlsby"), "tone", replace=False, origin=UPLOAD)
    assert (done.record.family, done.record.modules) == ("bottleneck", 2 * LAYERS)
    assert done.record.digest == lower(read("houlsby")).digest
    stored = registry.programs.checkpoint(done.record.digest)
    assert stored.tensors.keys() == read("houlsby").tensors.keys()
    registry.check_integrity()
    registry.close()


def test_the_base_that_it_names_is_compared() -> None:
    assert mismatches(read("houlsby").config, BASE) == ()
    assert mismatches(outer("houlsby", model_name="any/tiny").config, BASE) == ()
    (found,) = mismatches(outer("houlsby", model_name="org/other").config, BASE)
    assert found[0] == "model_name"
    hybrid = join([read("lora"), outer("houlsby", model_name="org/other")])
    assert [field for field, _ in mismatches(hybrid.config, BASE)] == ["parts[1].model_name"]


def test_the_client_sends_the_weights_under_the_common_name(tmp_path: Path) -> None:
    files = AdapterFiles.read(LLAMA / "houlsby").files
    assert [(f.name, f.path.name) for f in files] == [
        (CONFIG, CONFIG),
        (WEIGHTS, ADAPTERHUB_WEIGHTS),
    ]
    both = shutil.copytree(LLAMA / "houlsby", tmp_path / "both")
    shutil.copy(both / ADAPTERHUB_WEIGHTS, both / WEIGHTS)
    assert AdapterFiles.read(both).files[1].path.name == WEIGHTS


def test_its_pickles_are_refused_by_name(tmp_path: Path) -> None:
    folder = shutil.copytree(LLAMA / "houlsby", tmp_path / "a")
    (folder / ADAPTERHUB_WEIGHTS).rename(folder / "pytorch_adapter.bin")
    with pytest.raises(AdapterInvalid, match="is a pickle") as caught:
        read_checkpoint(folder, LIMITS)
    assert caught.value.field == "pytorch_adapter.bin"
    with pytest.raises(InvalidArgument, match=r"only pytorch_adapter\.bin is in"):
        AdapterFiles.read(folder)


def test_remote_sources_fetch_one_file_of_weights() -> None:
    names = [CONFIG, ADAPTERHUB_WEIGHTS, "adapter_interface.json", "pytorch_adapter.bin"]
    assert choose_files(dict.fromkeys(names, 10), LIMITS) == [CONFIG, ADAPTERHUB_WEIGHTS]
    assert choose_files(dict.fromkeys([*names, WEIGHTS], 10), LIMITS) == [CONFIG, WEIGHTS]


def test_adapters_of_different_families_are_combined_by_the_registry(tmp_path: Path) -> None:
    registry = make_registry(tmp_path / "store", BASE)
    importer = make_importer(registry, [FIXTURES])
    for name in ("pfeiffer", "parallel", "lora", "mam"):
        importer.load(str(LLAMA / name), name, replace=False, origin=UPLOAD)
    with registry.resolve_combination([("pfeiffer", 0.5), ("lora", -2.0)]) as lease:
        made = registry.programs.program(lease.record.digest)
        whole = bottleneck(lower(read("pfeiffer")), "model.layers.0.mlp")
        half = bottleneck(made, "model.layers.0.mlp")
        torch.testing.assert_close(half.up, 0.5 * whole.up)
        assert torch.equal(half.down, whole.down)
        assert made.packed_bytes(4) == lease.record.packed_bytes
    with registry.resolve_combination([("mam", 1.0), ("lora", 0.5)]) as lease:
        assert lease.record.leading == 5
    for weights, reason in (
        ([("pfeiffer", 1.0), ("parallel", 1.0)], "differ in what they read"),
        ([("mam", 0.5), ("lora", 1.0)], "KV prefix takes no weight but 1"),
    ):
        with pytest.raises(AdapterInvalid, match=reason) as caught:
            registry.resolve_combination(weights)
        assert caught.value.field == "adapters"
    assert registry.leased == 0
    registry.close()
