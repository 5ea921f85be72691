"""What is refused of the types that PEFT merges, and when: at the upload, never at a request."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from adaplex.adapters.checkpoint import CONFIG, WEIGHTS
from adaplex.adapters.errors import AdapterInvalid
from adaplex.adapters.formats.peft import merged_only
from adaplex.adapters.limits import AdapterLimits
from adaplex.adapters.program.base_match import BasePolicy
from adaplex.adapters.program.base_spec import BaseSpec
from adaplex.adapters.registry import read_adapter
from adaplex.adapters.registry.program_cache import ProgramCache
from adaplex.adapters.storage.folder_content import FolderContent
from adaplex.model.base.loader import load_base
from peft_adapters import load_plain
from peft_kinds import save_kind

SLOW = r"(?:[a-z]|[a-z_.]|[0-9a-z])*(?<=!)"
QUERY = "base_model.model.model.layers.0.self_attn.q_proj"
KINDS = ["OFT", "SHIRA", "PSOFT", "UNILORA", "DELORA", "HIRA", "SUPERTUNING", "TINYLORA"]


@pytest.fixture(scope="module")
def base(tiny_model: Callable[[str], Path]) -> BaseSpec:
    return load_base(str(tiny_model("llama")), quantization="fp32", native=False).spec


@pytest.fixture(scope="module")
def saved(
    tiny_model: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Path]:
    folders = {kind: tmp_path_factory.mktemp(kind) for kind in KINDS}
    for kind, folder in folders.items():
        save_kind(load_plain(tiny_model("llama")), folder, kind)
    return folders


class Upload:
    """A saved adapter, to be changed and then read as an upload is."""

    def __init__(self, source: Path, folder: Path, base: BaseSpec) -> None:
        self.config: dict[str, Any] = json.loads((source / CONFIG).read_text())
        self.tensors: dict[str, Tensor] = load_file(source / WEIGHTS)
        self.folder, self.base = folder, base

    def read(self) -> None:
        (self.folder / CONFIG).write_text(json.dumps(self.config))
        save_file(self.tensors, self.folder / WEIGHTS)
        programs = ProgramCache(
            FolderContent(self.folder / "store"),
            self.base,
            element_bytes=4,
            limits=AdapterLimits(),
            base_policy=BasePolicy.OFF,
            max_merged_bytes=None,
            is_needed=lambda _: False,
        )
        assert programs.read(self.folder).traits.merged_only

    def refused(self, reason: str) -> None:
        with pytest.raises(AdapterInvalid, match=reason):
            self.read()


@pytest.fixture
def upload(saved: dict[str, Path], base: BaseSpec, tmp_path: Path) -> Callable[[str], Upload]:
    (tmp_path / "store").mkdir()
    return lambda kind: Upload(saved[kind], tmp_path, base)


@pytest.mark.parametrize("kind", KINDS)
def test_a_whole_adapter_is_taken(kind: str, upload: Callable[[str], Upload]) -> None:
    upload(kind).read()


@pytest.mark.parametrize("kind", KINDS)
def test_a_missing_tensor_is_refused_by_name(kind: str, upload: Callable[[str], Upload]) -> None:
    sent = upload(kind)
    gone = sorted(sent.tensors)[0]
    del sent.tensors[gone]
    sent.tensors.setdefault("other", torch.zeros(1))
    sent.refused(f"{gone}: is missing; other: is not a tensor that PEFT saves")


@pytest.mark.parametrize("kind", KINDS)
def test_a_tensor_of_another_shape_is_refused(kind: str, upload: Callable[[str], Upload]) -> None:
    sent = upload(kind)
    for key, tensor in sent.tensors.items():
        sent.tensors[key] = torch.cat([tensor, tensor], -1)
    sent.refused("has shape|cannot apply")


@pytest.mark.parametrize(
    ("kind", "changes", "reason"),
    [
        ("OFT", {"surprise": 1}, "surprise: is not a known field of OFT"),
        ("OFT", {"bias": "all"}, "bias: trained biases"),
        ("OFT", {"target_modules": []}, "target_modules: is missing"),
        ("OFT", {"target_modules": ["nowhere"]}, "matches no linear"),
        ("OFT", {"target_modules": ["q_proj"]}, "is not a tensor that PEFT saves"),
        ("OFT", {"target_modules": "(x+x+)+y"}, "target_modules"),
        ("OFT", {"oft_block_size": -1}, "oft_block_size: is -1"),
        ("OFT", {"oft_block_size": 4}, "has shape"),
        ("OFT", {"oft_block_size": "8; rm"}, "PEFT cannot apply it"),
        ("OFT", {"oft_block_size": [8]}, "oft_block_size: must be a number"),
        ("OFT", {"num_cayley_neumann_terms": 10**9}, "the limit is 64"),
        ("OFT", {"eps": 10**12}, "eps: is 1000000000000, the limit is"),
        ("HIRA", {"rank_pattern": {SLOW: 2}}, "rank_pattern: .* takes longer"),
        ("HIRA", {"rank_pattern": ["q_proj"]}, "rank_pattern: must map patterns"),
        ("HIRA", {"rank_pattern": {"q_proj": 10**9}}, "rank_pattern: is 1000000000"),
        ("DELORA", {"rank_pattern": {"v_proj": 3}}, "has shape"),
        ("UNILORA", {"r": 10**5}, "r: is 100000, the limit is 256"),
        ("UNILORA", {"theta_d_length": 10**8}, "theta_d_length"),
        ("SUPERTUNING", {"save_precomputed_indices": False}, "must be true to be served"),
        ("TINYLORA", {"save_projection": False}, "must be true to be served"),
        ("PSOFT", {"psoft_svd": "x" * 41}, "longer than 40"),
    ],
)
def test_a_bad_config_is_refused_by_field(
    kind: str, changes: dict[str, Any], reason: str, upload: Callable[[str], Upload]
) -> None:
    sent = upload(kind)
    sent.config |= changes
    sent.refused(reason)


@pytest.mark.parametrize("position", [-1, 64, 2**31])
def test_positions_outside_of_the_weight_are_refused(
    position: int, upload: Callable[[str], Upload]
) -> None:
    sent = upload("SHIRA")
    key = f"{QUERY}.shira_indices"
    sent.tensors[key] = sent.tensors[key].long()
    sent.tensors[key][1, 3] = position
    sent.refused(f"{key}: has an index outside of the weight \\[64, 64\\]")


def test_flat_positions_outside_of_the_weight_are_refused(
    upload: Callable[[str], Upload],
) -> None:
    sent = upload("SUPERTUNING")
    (key,) = (k for k in sent.tensors if k.startswith(f"{QUERY}.supertuning_indices"))
    sent.tensors[key][0] = 64 * 64
    sent.refused(f"{QUERY.removeprefix('base_model.model.')} SUPERTUNING: PEFT cannot apply it")


def test_a_weight_that_would_not_be_finite_is_refused(upload: Callable[[str], Upload]) -> None:
    sent = upload("HIRA")
    for key in sent.tensors:
        sent.tensors[key] = sent.tensors[key] * 1e30
    sent.refused("its merged weight is not finite")


def test_real_numbers_for_positions_and_the_other_way_round(
    upload: Callable[[str], Upload],
) -> None:
    sent = upload("HIRA")
    key = f"{QUERY}.hira_A"
    sent.tensors[key] = sent.tensors[key].long()
    sent.refused(f"{key}: has dtype torch.int64")


def test_a_decomposition_needs_the_weights_as_they_were(
    upload: Callable[[str], Upload], base: BaseSpec
) -> None:
    sent = upload("PSOFT")
    sent.base = replace(base, quantization="nf4")
    sent.refused("this base is nf4: serve it in bf16 or fp32")


def test_without_peft_the_extra_is_named(
    upload: Callable[[str], Upload], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(merged_only, "is_installed", lambda: False)
    upload("OFT").refused("pip install 'adaplex\\[peft\\]'")


def test_a_long_trial_still_tries_every_shape(
    upload: Callable[[str], Upload], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(read_adapter, "TRIAL_SECONDS", 0.0)
    sent = upload("HIRA")
    key = "base_model.model.model.layers.0.mlp.down_proj.hira_"  # the first of its shape
    for half in "AB":
        sent.tensors[key + half] = sent.tensors[key + half] * 1e30
    sent.refused("its merged weight is not finite")
