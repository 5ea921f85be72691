"""A LoRA of llama.cpp through the server's own importer: the deltas that PEFT's file gives."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch

from adaplex.server.config import ServerConfig
from adaplex.server.open_store import open_store
from adapters.gguf_adapters import pairs_of, write_gguf
from adapters.handmade import UPLOAD
from peft_adapters import load_plain, save_adapter
from rig import ModelRig


def test_a_gguf_file_and_a_peft_directory_are_one_adapter(
    tiny_model: Callable[[str], Path], tmp_path: Path
) -> None:
    rig = ModelRig(tiny_model("llama"), "fp32")
    targets = ["q_proj", "k_proj", "v_proj", "down_proj"]
    directory = save_adapter(
        load_plain(tiny_model("llama")), tmp_path / "peft", seed=3, r=4, target_modules=targets
    )
    write_gguf(tmp_path / "tone.gguf", pairs_of(directory, "llama"), alpha=8.0)
    config = ServerConfig(store_dir=tmp_path / "store", adapter_roots=(tmp_path,))
    store = open_store(config, rig.base.spec, element_bytes=4)
    for name, uri in (("peft", directory), ("gguf", tmp_path / "tone.gguf")):
        store.importer.load(str(uri), name, replace=False, origin=UPLOAD)
    peft, gguf = (
        store.registry.programs.program(store.registry.names.get(name).digest)
        for name in ("peft", "gguf")
    )
    assert [m.module for m in peft.modules] == [m.module for m in gguf.modules]
    for one, other in zip(peft.modules, gguf.modules, strict=True):
        assert one.low_rank is not None
        assert other.low_rank is not None
        assert torch.equal(one.low_rank.a, other.low_rank.a)
        assert torch.allclose(one.low_rank.b, other.low_rank.b, rtol=1e-6)
    assert store.registry.names.get("gguf").source.endswith("tone.gguf")
    store.registry.close()
