from __future__ import annotations

import json
import pickle
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save, save_file

from adaplex.adapters.checkpoint import CONFIG, WEIGHTS, read_checkpoint
from adaplex.adapters.errors import AdapterError, AdapterInvalid, AdapterTooLarge
from adaplex.adapters.limits import AdapterLimits
from adapters.handmade import files, safetensors_bytes, tensors, write

LIMITS = AdapterLimits()
F32 = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}


def read(directory: Path, limits: AdapterLimits = LIMITS, **changed: bytes) -> AdapterError:
    """The error of reading a good adapter of which the config or the weights are replaced."""
    contents = files()
    if "weights" in changed:
        contents[WEIGHTS] = changed["weights"]
    if "config" in changed:
        contents[CONFIG] = changed["config"]
    with pytest.raises(AdapterError) as caught:
        read_checkpoint(write(directory, contents), limits)
    return caught.value


def test_a_good_directory_is_read_as_written(tmp_path: Path) -> None:
    found = read_checkpoint(write(tmp_path, files()), LIMITS)
    assert found.config == json.loads(files()[CONFIG])
    assert found.tensors.keys() == tensors().keys()
    for name, tensor in tensors().items():
        assert torch.equal(found.tensors[name], tensor)


@pytest.mark.parametrize("name", [CONFIG, WEIGHTS])
def test_a_missing_file_is_named(tmp_path: Path, name: str) -> None:
    write(tmp_path, {other: data for other, data in files().items() if other != name})
    with pytest.raises(AdapterInvalid, match="missing") as caught:
        read_checkpoint(tmp_path, LIMITS)
    assert caught.value.field == name


def test_a_pickle_beside_the_config_is_named(tmp_path: Path) -> None:
    write(tmp_path, {CONFIG: files()[CONFIG], "adapter_model.bin": b"\x80\x02}."})
    with pytest.raises(AdapterInvalid, match="is a pickle") as caught:
        read_checkpoint(tmp_path, LIMITS)
    assert caught.value.field == "adapter_model.bin"


TRUNCATED = "is truncated: the header is incomplete"
BAD_WEIGHTS: dict[str, tuple[bytes, str, str]] = {
    "empty": (b"", WEIGHTS, TRUNCATED),
    "length cut short": (b"\x01\x00\x00", WEIGHTS, TRUNCATED),
    "header cut short": (files()[WEIGHTS][:40], WEIGHTS, TRUNCATED),
    "length beyond the file": (safetensors_bytes({}, length=1 << 62), WEIGHTS, TRUNCATED),
    "data cut short": (files()[WEIGHTS][:-1], WEIGHTS, "bytes of data where the header"),
    "trailing bytes": (files()[WEIGHTS] + b"\0", WEIGHTS, "bytes of data where the header"),
    "pickle": (pickle.dumps({"weight": [1.0]}, protocol=2), WEIGHTS, "is a pickle"),
    "pickle 5": (pickle.dumps({"weight": [1.0]}, protocol=5), WEIGHTS, "is a pickle"),
    "zip": (b"PK\x03\x04" + bytes(100), WEIGHTS, "is a pickle"),
    "header not JSON": (safetensors_bytes(b"{nonsense}"), WEIGHTS, "is not JSON"),
    "header not UTF-8": (safetensors_bytes(b'{"\xff": 1}'), WEIGHTS, "is not JSON"),
    "header a list": (safetensors_bytes([]), WEIGHTS, "is not a JSON object"),
    "duplicate key": (safetensors_bytes(b'{"a": 1, "a": 2}'), WEIGHTS, "a key is repeated"),
    "no tensor": (safetensors_bytes({}), WEIGHTS, "contains no tensor"),
    "only metadata": (safetensors_bytes({"__metadata__": {}}), WEIGHTS, "contains no tensor"),
    "bad metadata": (
        safetensors_bytes({"__metadata__": {"a": 1}, "t": F32}, bytes(8)),
        "__metadata__",
        "strings to strings",
    ),
}


@pytest.mark.parametrize("case", BAD_WEIGHTS)
def test_bad_weights_are_refused_with_their_file(tmp_path: Path, case: str) -> None:
    data, where, reason = BAD_WEIGHTS[case]
    error = read(tmp_path, weights=data)
    assert type(error) is AdapterInvalid
    assert where in error.field
    assert reason in str(error)


def test_a_real_archive_is_refused_as_a_pickle(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "torch", "w") as archive:
        archive.writestr("archive/data.pkl", b"\x80\x02}.")
    error = read(tmp_path / "adapter", weights=(tmp_path / "torch").read_bytes())
    assert "is a pickle" in str(error)


@pytest.mark.parametrize("length", [1152, 1408])
def test_a_header_length_that_begins_like_a_pickle_is_no_pickle(
    tmp_path: Path, length: int
) -> None:
    weights = save(tensors())
    header = weights[8 : 8 + int.from_bytes(weights[:8], "little")]
    padded = json.loads(header)
    padded["__metadata__"] = {"pad": ""}
    padded["__metadata__"]["pad"] = "x" * (length - len(json.dumps(padded)))
    contents = files()
    contents[WEIGHTS] = safetensors_bytes(padded, weights[8 + len(header) :])
    assert contents[WEIGHTS][0] == 0x80
    found = read_checkpoint(write(tmp_path, contents), LIMITS)
    assert found.tensors.keys() == tensors().keys()


BAD_ENTRIES: dict[str, tuple[Any, str]] = {
    "C64": (F32 | {"dtype": "C64", "shape": [1]}, "C64"),
    "F4": (F32 | {"dtype": "F4", "shape": [16]}, "F4"),
    "dtype a list": (F32 | {"dtype": ["F32"]}, "dtype"),
    "negative shape": (F32 | {"shape": [-2]}, "shape [-2]"),
    "two negative sizes": (F32 | {"shape": [-2, -1]}, "shape [-2, -1]"),
    "huge shape": (F32 | {"shape": [10**18]}, "shape [1000000000000000000]"),
    "shape beyond 64 bits": (F32 | {"shape": [0, 10**30], "data_offsets": [0, 0]}, "shape"),
    "fractional shape": (F32 | {"shape": [2.0]}, "shape [2.0]"),
    "true as a size": (F32 | {"shape": [True, 2]}, "shape [True, 2]"),
    "shape a string": (F32 | {"shape": "2"}, "shape '2'"),
    "shape an object": (F32 | {"shape": {}, "data_offsets": [0, 4]}, "shape {}"),
    "too many dimensions": (F32 | {"shape": [1, 1, 1, 1, 2]}, "shape"),
    "shape and bytes differ": (F32 | {"shape": [3]}, "12"),
    "offsets reversed": (F32 | {"data_offsets": [8, 0]}, "-8 bytes"),
    "negative offset": (F32 | {"data_offsets": [-8, 0]}, "-8"),
    "one offset": (F32 | {"data_offsets": [8]}, "[8]"),
    "offset a string": (F32 | {"data_offsets": ["0", "8"]}, "'0'"),
    "no dtype": ({"shape": [2], "data_offsets": [0, 8]}, "header entry"),
    "not an object": ("F32", "header entry"),
    "null": (None, "header entry"),
}


@pytest.mark.parametrize("case", BAD_ENTRIES)
def test_a_bad_entry_is_refused_with_its_tensor(tmp_path: Path, case: str) -> None:
    entry, reason = BAD_ENTRIES[case]
    error = read(tmp_path, weights=safetensors_bytes({"the.tensor": entry}, bytes(8)))
    assert type(error) is AdapterInvalid
    assert error.field == "the.tensor"
    assert reason in str(error)


def test_an_overlap_and_a_gap_are_refused_with_their_tensors(tmp_path: Path) -> None:
    header = {
        "first": F32,
        "overlaps": F32 | {"data_offsets": [4, 12]},
        "behind a gap": F32 | {"data_offsets": [16, 24]},
    }
    error = read(tmp_path, weights=safetensors_bytes(header, bytes(24)))
    assert isinstance(error, AdapterInvalid)
    assert [refusal.where for refusal in error.refusals] == ["overlaps", "behind a gap"]
    assert all("overlaps another tensor, or leaves a gap" in str(r) for r in error.refusals)


def test_every_bad_tensor_is_named_not_only_the_first(tmp_path: Path) -> None:
    header = {name: F32 | {"dtype": "C64"} for name in ("a", "b", "c")}
    error = read(tmp_path, weights=safetensors_bytes(header, bytes(8)))
    assert isinstance(error, AdapterInvalid)
    assert [refusal.where for refusal in error.refusals] == ["a", "b", "c"]


FLOATS = [torch.float32, torch.float16, torch.bfloat16]
READ_AS_FLOAT32 = [torch.float64, torch.float8_e4m3fn, torch.float8_e5m2]
INTEGERS = [torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool]


@pytest.mark.parametrize("dtype", [*FLOATS, *READ_AS_FLOAT32, *INTEGERS])
def test_every_type_that_peft_takes_is_read(tmp_path: Path, dtype: torch.dtype) -> None:
    tensor = torch.tensor([0.0, 1.0, 1.5, -0.25]).to(dtype)
    save_file({"a": tensor}, tmp_path / WEIGHTS)
    (tmp_path / CONFIG).write_text("{}")
    found = read_checkpoint(tmp_path, LIMITS).tensors["a"]
    assert found.dtype is (torch.float32 if dtype in READ_AS_FLOAT32 else dtype)
    assert torch.equal(found.double(), tensor.double())


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_what_is_not_finite_is_refused_with_its_tensor(
    tmp_path: Path, value: float, dtype: torch.dtype
) -> None:
    weights = {"fine": torch.ones(3), "broken": torch.tensor([1.0, value, 2.0]).to(dtype)}
    error = read(tmp_path, weights=save(weights))
    assert isinstance(error, AdapterInvalid)
    assert [r.where for r in error.refusals] == ["broken"]
    assert "NaN or infinity" in str(error)


BAD_CONFIGS: dict[str, tuple[bytes, str]] = {
    "not JSON": (b"r = 8", "is not JSON"),
    "empty": (b"", "is not JSON"),
    "not UTF-8": (b'{"peft_type": "\xff"}', "is not JSON"),
    "a list": (b"[]", "is not a JSON object"),
    "a number": (b"1", "is not a JSON object"),
    "duplicate key": (b'{"r": 1, "r": 2}', "a key is repeated"),
    "duplicate key inside": (b'{"rank_pattern": {"a": 1, "a": 2}}', "a key is repeated"),
    "deeply nested": (b'{"r": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", "is not JSON"),
    "nested": (b'{"r": ' + b"[" * 60 + b"]" * 60 + b"}", "nested deeper than"),
    "NaN": (b'{"r": NaN}', "NaN"),
    "half a surrogate pair": (rb'{"\ud800": 1}', "surrogates"),
    "endless number": (b'{"r": ' + b"9" * 5000 + b"}", "is not JSON"),
}


@pytest.mark.parametrize("case", BAD_CONFIGS)
def test_a_bad_config_is_refused_with_its_file(tmp_path: Path, case: str) -> None:
    data, reason = BAD_CONFIGS[case]
    error = read(tmp_path, config=data)
    assert type(error) is AdapterInvalid
    assert error.field == CONFIG
    assert reason in str(error)
    assert str(error).encode("utf-8")


@pytest.mark.parametrize(
    ("limits", "field", "reason"),
    [
        (AdapterLimits(max_config_bytes=20), CONFIG, "the limit is 20"),
        (AdapterLimits(max_header_bytes=30), WEIGHTS, "the header of .* the limit is 30"),
        (AdapterLimits(max_tensors=3), WEIGHTS, "8 tensors, the limit is 3"),
        (AdapterLimits(max_adapter_bytes=100), WEIGHTS, "the limit is 100"),
    ],
)
def test_sizes_are_limited(tmp_path: Path, limits: AdapterLimits, field: str, reason: str) -> None:
    with pytest.raises(AdapterTooLarge, match=reason) as caught:
        read_checkpoint(write(tmp_path, files()), limits)
    assert caught.value.field == field
