"""A saved base is read as it was written or not at all, whatever the disk did to its bytes."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import nn

from adaplex.model.base.architecture import Probe
from adaplex.model.base.saved_base import SavedBase

KEY = {"fingerprint": "sha256:0"}


def module(seed: int) -> nn.Module:
    """Returns a module with weights of three types."""
    torch.manual_seed(seed)
    made = nn.ModuleDict({"a": nn.Linear(5, 7), "b": nn.LayerNorm(9).bfloat16()})
    made.register_buffer("codes", torch.arange(33, dtype=torch.uint8))
    return made


def damages(content: bytes) -> Iterator[tuple[str, bytes]]:
    """Yields a file with a bit flipped in every third byte, with zeros, cut short and longer."""
    draw = random.Random(0)
    for place in range(0, len(content), 3):
        flipped = content[place] ^ 1 << draw.randrange(8)
        yield f"bit at {place}", content[:place] + bytes([flipped]) + content[place + 1 :]
    for place in range(0, len(content), 64):
        yield f"zeros at {place}", content[:place] + bytes(64) + content[place + 64 :]
        yield f"cut at {place}", content[:place]
    yield "longer", content + bytes(8)
    assert content.count(b'"dtype": "BF16"') > 0
    yield "another type", content.replace(b'"dtype": "BF16"', b'"dtype":  "F16"', 1)
    yield "another shape", content.replace(b'"shape": [7, 5]', b'"shape": [5, 7]', 1)


def test_no_damage_changes_a_tensor(tmp_path: Path) -> None:
    made, saved = module(1), SavedBase(tmp_path, KEY)
    saved.write(made, Probe())
    content, found = saved.path.read_bytes(), 0
    for what, damaged in damages(content):
        if damaged == content:
            continue
        saved.path.unlink()  # a file that is mapped is not written to
        saved.path.write_bytes(damaged)
        restored = module(2)
        try:
            contents = saved.read()
            assert contents is not None
            contents.fill(restored)
        except Exception:  # any kind: the base is then quantized again
            found += 1
            continue
        expected = made.state_dict()
        assert all(torch.equal(t, expected[name]) for name, t in restored.state_dict().items()), (
            what
        )
    assert found > len(content) // 3  # nearly all: a bit of JSON may mean nothing
