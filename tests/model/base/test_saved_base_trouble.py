"""A saved base that is damaged, cannot be written, or is written by another meanwhile."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from filelock import FileLock
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from adaplex.model.base import build_model, saved_base
from adaplex.model.base.build_model import ModelBuilder
from adaplex.model.base.loader import BaseModel, load_base
from adaplex.model.base.source import default_cache
from adaplex.model.kernels.native.kernels import NativeKernels
from adaplex.model.linear.native import native_linear
from model.base.saved_bases import check_equal, state_of


class Starts:
    """Loads one model again and again, and records the lines of its progress."""

    def __init__(self, model: Path, folder: Path) -> None:
        self._model, self._folder = model, folder
        self.lines: list[str] = []

    def __call__(self) -> BaseModel:
        self.lines.clear()
        return load_base(str(self._model), saved=self._folder, progress=self.lines.append)

    @property
    def quantized(self) -> bool:
        return any(line.startswith("quantizing") for line in self.lines)

    @property
    def file(self) -> Path:
        (file,) = self._folder.glob("*.safetensors")
        return file

    def rewrite(self, *, without: str = "", **changes: str) -> None:
        """Changes the metadata of the file, or removes a tensor."""
        with safe_open(self.file, "pt") as file:
            metadata = {**file.metadata(), **changes}
        tensors = {name: t.clone() for name, t in load_file(self.file).items() if name != without}
        changed = self.file.with_suffix(".new")
        save_file(tensors, changed, metadata)
        changed.rename(self.file)

    def replace(self, content: bytes) -> None:
        """Replaces the file: bases that map the old one can still read it."""
        changed = self.file.with_suffix(".new")
        changed.write_bytes(content)
        changed.rename(self.file)

    @property
    def described(self) -> dict[str, Any]:
        with safe_open(self.file, "pt") as file:
            described: dict[str, Any] = json.loads(file.metadata()["description"])
        return described


@pytest.fixture
def starts(tiny_model: Callable[[str], Path], tmp_path: Path) -> Starts:
    """A model that was started once."""
    starts = Starts(tiny_model("qwen2"), tmp_path / "saved")
    starts()
    assert starts.quantized
    return starts


def empty(starts: Starts) -> None:
    starts.replace(b"")


def truncate(starts: Starts) -> None:
    starts.replace(starts.file.read_bytes()[:-1])


def scribble(starts: Starts) -> None:
    starts.replace(b"no safetensors" * 99)


def of_another_version(starts: Starts) -> None:
    starts.rewrite(key='{"layout": 0}')


def without_a_norm(starts: Starts) -> None:
    starts.rewrite(without="model.norm.weight")


def without_a_linear(starts: Starts) -> None:
    starts.rewrite(without="model.layers.1.mlp.up_proj/panels")


def with_another_description(starts: Starts) -> None:
    description = starts.described
    del description["sites"][0]
    starts.rewrite(description=json.dumps(description))


def with_no_description(starts: Starts) -> None:
    starts.rewrite(description="")


def one_bit(starts: Starts) -> None:
    content = bytearray(starts.file.read_bytes())
    content[len(content) * 2 // 3] ^= 4
    starts.replace(bytes(content))


@pytest.mark.parametrize(
    "damage",
    [
        one_bit,
        truncate,
        empty,
        scribble,
        of_another_version,
        without_a_norm,
        without_a_linear,
        with_another_description,
        with_no_description,
    ],
)
def test_a_damaged_file_is_reported_and_replaced(
    damage: Callable[[Starts], None], starts: Starts
) -> None:
    made = starts()
    assert not starts.quantized
    damage(starts)
    again = starts()
    (line,) = [line for line in starts.lines if "cannot be used" in line]
    assert str(starts.file) in line
    assert starts.quantized
    check_equal(again, made)
    check_equal(starts(), made)
    assert not starts.quantized


@pytest.mark.slow
def test_another_process_maps_it_and_imports_nothing_that_quantizes(
    starts: Starts, tiny_model: Callable[[str], Path]
) -> None:
    code = """
import sys
from pathlib import Path
from adaplex.model.base.loader import load_base
load_base(sys.argv[1], saved=Path(sys.argv[2]), progress=print)
print("bitsandbytes" in sys.modules)
"""
    command = [sys.executable, "-c", code, str(tiny_model("qwen2")), str(starts.file.parent)]
    lines = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    assert lines[-2:] == ["mapping the nf4 weights of an earlier start", "False"]


def test_other_panels_are_refused(tmp_path: Path) -> None:
    kernels = NativeKernels(torch.bfloat16, default_cache())
    layer = native_linear(kernels, torch.randn(64, 128).bfloat16(), None, nf4=True)
    assert layer is not None
    with pytest.raises(ValueError, match="do not hold a weight"):
        type(layer).restored(kernels, layer.tensors(), (64, 256), None)


def test_a_raised_layout_leaves_the_old_file_alone(
    starts: Starts, monkeypatch: pytest.MonkeyPatch
) -> None:
    old = starts.file
    monkeypatch.setattr(saved_base, "LAYOUT", saved_base.LAYOUT + 1)
    starts()
    assert starts.quantized
    assert len(list(old.parent.glob("*.safetensors"))) == 2
    starts()
    assert not starts.quantized


@pytest.mark.parametrize("case", ["no folder", "no room"])
def test_a_base_that_cannot_be_saved_serves(
    case: str,
    tiny_model: Callable[[str], Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    folder = tmp_path / "saved"
    if case == "no folder":
        folder.write_text("a file")
    else:

        def full(path: Path, *_: Any) -> None:
            path.write_bytes(b"half")
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(saved_base, "_write", full)
    starts = Starts(tiny_model("llama"), folder)
    assert starts().weight_bytes > 0
    assert sum("cannot be saved" in line for line in starts.lines) == 1
    if case == "no room":
        assert [path.suffix for path in folder.iterdir()] == [".lock"]


def test_while_another_process_saves_nobody_waits(
    tiny_model: Callable[[str], Path], tmp_path: Path
) -> None:
    starts = Starts(tiny_model("llama"), tmp_path)
    starts()
    file = starts.file
    file.unlink()
    partial = file.with_name(f".{file.name}.partial")
    with FileLock(f"{partial}.lock"):
        partial.write_bytes(b"half of what the other writes")
        starts()
        assert starts.quantized
        assert partial.exists()
        assert not file.exists()
    starts()  # the other was killed
    assert starts.quantized
    assert not partial.exists()
    starts()
    assert not starts.quantized


def test_a_mapped_file_may_be_replaced(starts: Starts) -> None:
    before = starts()
    expected = {name: tensor.clone() for name, tensor in state_of(before.module).items()}
    scribble(starts)
    for name, tensor in state_of(before.module).items():
        assert torch.equal(tensor, expected[name])


def test_a_kernel_for_tensors_without_data_that_is_missing_is_imported(
    starts: Starts, monkeypatch: pytest.MonkeyPatch
) -> None:
    empty, imported = ModelBuilder._empty, []

    def needs_kernels(*arguments: Any) -> Any:
        if not imported:
            raise NotImplementedError("aten::some_operation: no kernel for Meta")
        return empty(*arguments)

    monkeypatch.setattr(ModelBuilder, "_empty", needs_kernels)
    monkeypatch.setattr(build_model, "import_meta_kernels", lambda: imported.append(True))
    assert starts().weight_bytes > 0
    assert imported == [True]
    assert not starts.quantized
