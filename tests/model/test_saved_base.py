"""A base that was saved answers with the bits of the one that was quantized."""

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
from torch import nn

from adaplex.model import assembly, saved_base
from adaplex.model.adapted import AdaptedLinear
from adaplex.model.kernels.native.kernels import NativeKernels
from adaplex.model.loader import BaseModel, load_base
from adaplex.model.native_linear import native_linear
from adaplex.model.saved_base import ALIGNMENT, SavedBase
from adaplex.model.source import default_cache
from rig import Rig, prompt
from tiny import ARCHITECTURES, save_tiny

KEPT = [
    *(
        (quantization, native)
        for quantization in ("nf4", "int4-group", "bf16", "fp32")
        for native in (True, False)
    ),
    ("int8", True),
]


@pytest.fixture
def no_checkpoint(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """From its call on, a base comes from what was saved or not at all."""

    def forbid() -> None:
        def read(*_: Any, **__: Any) -> None:
            raise AssertionError("the checkpoint was read")

        monkeypatch.setattr(assembly.AutoModelForCausalLM, "from_pretrained", read)
        monkeypatch.setattr(assembly, "probe", read)

    return forbid


def state_of(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor for name, _, _, tensor in saved_base._state(model)}


def check_equal(restored: BaseModel, made: BaseModel) -> None:
    """Asserts that nothing tells the two apart."""
    assert restored.spec.modules == made.spec.modules
    assert (restored.spec.digest, restored.shapes) == (made.spec.digest, made.shapes)
    assert restored.weight_bytes == made.weight_bytes
    assert {name: type(each) for name, each in restored.backends.items()} == {
        name: type(each) for name, each in made.backends.items()
    }
    assert restored.spec.biases.keys() == made.spec.biases.keys()
    for name, bias in made.spec.biases.items():
        assert torch.equal(restored.spec.biases[name], bias)
    found, expected = state_of(restored.module), state_of(made.module)
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor), name
    for name, backend in made.backends.items():
        tensors = restored.backends[name].tensors()
        for part, tensor in backend.tensors().items():
            assert torch.equal(tensors[part], tensor), (name, part)


def check_same_bits(restored: Rig, made: Rig) -> None:
    """Asserts that a prompt, and steps after it, give the same bits."""
    for length in (3, 70):
        sequences = [rig.sequence(prompt(length)) for rig in (restored, made)]
        assert torch.equal(restored.prefill(sequences[0]), made.prefill(sequences[1]))
    generated = [
        rig.generate([rig.sequence(prompt(length, 1)) for length in (5, 40)], 6)
        for rig in (restored, made)
    ]
    assert generated[0] == generated[1]


@pytest.mark.parametrize(("quantization", "native"), KEPT)
@pytest.mark.parametrize("architecture", sorted(ARCHITECTURES))
def test_the_saved_base_is_the_quantized_one(
    architecture: str,
    quantization: str,
    native: bool,
    tiny_model: Callable[[str], Path],
    tmp_path: Path,
    no_checkpoint: Callable[[], None],
) -> None:
    kept = {"quantization": quantization, "native": native, "saved": tmp_path}
    made = Rig(tiny_model(architecture), **kept)
    no_checkpoint()
    restored = Rig(tiny_model(architecture), **kept)
    check_equal(restored.base, made.base)
    check_same_bits(restored, made)


def test_tied_embeddings_are_tied_again(tmp_path: Path, no_checkpoint: Callable[[], None]) -> None:
    directory = save_tiny("llama", tmp_path / "tied", tie_word_embeddings=True)
    made = Rig(directory, "nf4", saved=tmp_path / "saved")
    no_checkpoint()
    restored = Rig(directory, "nf4", saved=tmp_path / "saved")
    check_equal(restored.base, made.base)
    check_same_bits(restored, made)


def test_parameters_under_two_names_are_one_again(tmp_path: Path) -> None:
    model = nn.Module()
    model.add_module("a", nn.LayerNorm(5))
    model.add_module("b", nn.LayerNorm(5))
    model.b.weight = model.a.weight  # type: ignore[union-attr]
    base = SavedBase(tmp_path, {"of": "two norms"})
    base.write(model, assembly.Probe())
    with torch.device("meta"):
        empty = nn.Module()
        empty.add_module("a", nn.LayerNorm(5))
        empty.add_module("b", nn.LayerNorm(5))
    contents = base.read()
    assert contents is not None
    contents.fill(empty)
    assert empty.a.weight is empty.b.weight  # type: ignore[union-attr]
    assert empty.a.bias is not empty.b.bias  # type: ignore[union-attr]
    assert torch.equal(empty.b.weight, model.a.weight)  # type: ignore[union-attr, arg-type]


def test_large_tensors_stay_in_the_file(tiny_model: Callable[[str], Path], tmp_path: Path) -> None:
    load_base(str(tiny_model("llama")), saved=tmp_path)
    base = load_base(str(tiny_model("llama")), saved=tmp_path)
    (file,) = tmp_path.glob("*.safetensors")
    table: torch.Tensor = base.module.get_input_embeddings().weight  # type: ignore[operator]
    mapped = [
        tuple(int(end, 16) for end in line.split()[0].split("-"))
        for line in Path("/proc/self/maps").read_text().splitlines()
        if line.endswith(str(file))
    ]
    assert any(start <= table.data_ptr() < stop for start, stop in mapped)
    assert table.data_ptr() % ALIGNMENT == 0
    assert file.stat().st_mode & 0o777 == 0o644


class Starts:
    """Loads one model again and again, and keeps what was told."""

    def __init__(self, model: Path, folder: Path) -> None:
        self._model, self._folder = model, folder
        self.told: list[str] = []

    def __call__(self) -> BaseModel:
        self.told.clear()
        return load_base(str(self._model), saved=self._folder, progress=self.told.append)

    @property
    def quantized(self) -> bool:
        return any(line.startswith("quantizing") for line in self.told)

    @property
    def file(self) -> Path:
        (file,) = self._folder.glob("*.safetensors")
        return file

    def rewrite(self, *, without: str = "", **said: str) -> None:
        """Changes what the file says or holds."""
        with safe_open(self.file, "pt") as file:
            metadata = {**file.metadata(), **said}
        tensors = {name: t.clone() for name, t in load_file(self.file).items() if name != without}
        changed = self.file.with_suffix(".new")
        save_file(tensors, changed, metadata)
        changed.rename(self.file)

    def replace(self, content: bytes) -> None:
        """Puts another file there: bases that map the old one go on."""
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
    """Has started once."""
    starts = Starts(tiny_model("qwen2"), tmp_path / "saved")
    starts()
    assert starts.quantized
    return starts


def truncate(starts: Starts) -> None:
    starts.replace(starts.file.read_bytes()[:-1])


def empty(starts: Starts) -> None:
    starts.replace(b"")


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


@pytest.mark.parametrize(
    "damage",
    [
        *(truncate, empty, scribble, of_another_version, without_a_norm, without_a_linear),
        *(with_another_description, with_no_description),
    ],
)
def test_a_damaged_file_is_told_and_made_anew(
    damage: Callable[[Starts], None], starts: Starts
) -> None:
    made = starts()
    assert not starts.quantized
    damage(starts)
    again = starts()
    (line,) = [line for line in starts.told if "made anew" in line]
    assert str(starts.file) in line
    assert starts.quantized
    check_equal(again, made)
    check_equal(starts(), made)
    assert not starts.quantized


def test_another_process_maps_it_and_imports_nothing_that_quantizes(
    starts: Starts, tiny_model: Callable[[str], Path]
) -> None:
    code = """
import sys
from pathlib import Path
from adaplex.model.loader import load_base
load_base(sys.argv[1], saved=Path(sys.argv[2]), progress=print)
print("bitsandbytes" in sys.modules)
"""
    command = [sys.executable, "-c", code, str(tiny_model("qwen2")), str(starts.file.parent)]
    told = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    assert told == ["mapping the nf4 weights of an earlier start", "False"]


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
    assert sum("cannot be saved" in line for line in starts.told) == 1
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


def test_what_a_base_is_made_of_names_its_file(tmp_path: Path) -> None:
    saved = tmp_path / "saved"
    names = []
    int4 = {"quantization": "int4-group"}
    for options in (
        *({}, {"quantization": "int8"}, {"native": False}, {"dtype": "fp32"}),
        *(int4, int4 | {"group_size": 16}),
    ):
        directory = save_tiny("llama", tmp_path / "tiny")
        load_base(str(directory), saved=saved, **options)  # type: ignore[arg-type]
        names.append(len(list(saved.glob("*.safetensors"))))
    load_base(str(save_tiny("llama", tmp_path / "tiny", seed=1)), saved=saved)
    names.append(len(list(saved.glob("*.safetensors"))))
    assert names == [1, 2, 3, 4, 5, 6, 7]


def test_nothing_is_saved_unless_asked(
    tiny_model: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def write(*_: Any) -> None:
        raise AssertionError("saved")

    monkeypatch.setattr(SavedBase, "write", write)
    base = load_base(str(tiny_model("llama")))
    assert any(isinstance(module, AdaptedLinear) for module in base.module.modules())
