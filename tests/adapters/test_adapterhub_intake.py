"""AdapterHub's files: how they come in, and what they are mixed with."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

from adaplex.adapters.checkpoint import ADAPTERHUB_WEIGHTS, CONFIG, WEIGHTS, read_checkpoint
from adaplex.adapters.errors import AdapterInvalid
from adaplex.adapters.formats.bundle import bundle
from adaplex.adapters.program.base_match import mismatches
from adaplex.adapters.sources.transfer import choose_files
from adaplex.client.errors import InvalidArgument
from adaplex.client.upload import AdapterFiles
from adapters.adapterhub_files import BASE, FIXTURES, LAYERS, LIMITS, bottleneck, lower, outer, read
from adapters.handmade import UPLOAD, make_importer, make_registry

LLAMA = FIXTURES / "llama"


def test_a_directory_of_the_library_comes_in_by_the_importer(tmp_path: Path) -> None:
    registry = make_registry(tmp_path / "store", BASE)
    importer = make_importer(registry, [FIXTURES])
    done = importer.load(str(LLAMA / "houlsby"), "tone", replace=False, origin=UPLOAD)
    assert (done.record.family, done.record.traits.modules) == ("bottleneck", 2 * LAYERS)
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
    bundled = bundle([read("lora"), outer("houlsby", model_name="org/other")])
    assert [field for field, _ in mismatches(bundled.config, BASE)] == ["parts[1].model_name"]


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


def test_adapters_of_different_families_are_mixed_by_the_registry(tmp_path: Path) -> None:
    registry = make_registry(tmp_path / "store", BASE)
    importer = make_importer(registry, [FIXTURES])
    for name in ("pfeiffer", "parallel", "lora", "mam"):
        importer.load(str(LLAMA / name), name, replace=False, origin=UPLOAD)
    with registry.resolve_mix([("pfeiffer", 0.5), ("lora", -2.0)]) as lease:
        made = registry.programs.program(lease.record.digest)
        whole = bottleneck(lower(read("pfeiffer")), "model.layers.0.mlp")
        half = bottleneck(made, "model.layers.0.mlp")
        torch.testing.assert_close(half.up, 0.5 * whole.up)
        assert torch.equal(half.down, whole.down)
        assert made.packed_bytes(4) == lease.record.packed_bytes
    with registry.resolve_mix([("mam", 1.0), ("lora", 0.5)]) as lease:
        assert lease.record.traits.leading == 5
    for weights, reason in (
        ([("pfeiffer", 1.0), ("parallel", 1.0)], "differ in input or activation"),
        ([("mam", 0.5), ("lora", 1.0)], "KV prefix must have weight 1"),
    ):
        with pytest.raises(AdapterInvalid, match=reason) as caught:
            registry.resolve_mix(weights)
        assert caught.value.field == "adapters"
    assert registry.leased == 0
    registry.close()
