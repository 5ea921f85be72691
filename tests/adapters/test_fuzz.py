"""Damaged uploads give a valid report or a refusal, and leave everything else as it was."""

from __future__ import annotations

import json
import pickle
import struct
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from adaplex.adapters.checkpoint import CONFIG, WEIGHTS
from adaplex.adapters.errors import AdapterError
from adaplex.adapters.formats.lora.config import HARMLESS, UNSUPPORTED, USED
from adaplex.adapters.registry.registry import AdapterRegistry
from adaplex.adapters.storage.staging import FileSpec, Staging
from adapters.handmade import (
    UPLOAD,
    config,
    files,
    make_registry,
    push,
    safetensors_bytes,
    specs,
    stage,
    tensors,
)

pytestmark = pytest.mark.slow

GOOD = files()
HEADER_BYTES = int.from_bytes(GOOD[WEIGHTS][:8], "little")
HEADER: dict[str, Any] = json.loads(GOOD[WEIGHTS][8 : 8 + HEADER_BYTES])
DATA = GOOD[WEIGHTS][8 + HEADER_BYTES :]
bounded = settings(
    derandomize=True,
    deadline=None,
    max_examples=150,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)

numbers = st.integers() | st.integers(-3, 20) | st.floats() | st.sampled_from([2**63, 10**400])
scalars = st.none() | st.booleans() | numbers | st.text(max_size=8)
values = st.recursive(
    scalars,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.text(max_size=6) | st.just("q_proj"), inner, max_size=3)
    ),
    max_leaves=6,
)
patterns = st.text("()[]{}|*+?.^$\\dwqproj_v1,=<>P", max_size=24)
places = st.sampled_from(sorted(HEADER))


@pytest.fixture(scope="module")
def registry(tmp_path_factory: pytest.TempPathFactory) -> Iterator[AdapterRegistry]:
    made = make_registry(tmp_path_factory.mktemp("store"))
    push(made, "untouched", seed=7)
    yield made
    made.close()


def survive(registry: AdapterRegistry, contents: dict[str, bytes]) -> None:
    """Checks and commits an upload, and checks that the registry stays sound either way."""
    with stage(registry, contents, chunk=1 << 16) as staging:
        report = registry.intake.check(staging)
        assert report.valid == (not report.refusals)
        if report.valid:
            assert report.modules
            assert report.digest
            assert report.packed_bytes > 0
            assert (
                registry.intake.commit(staging, "fuzzed", replace=True, origin=UPLOAD).report
                == report
            )
        else:
            for refusal in report.refusals:
                assert refusal.reason
                assert str(refusal).encode("utf-8")
            with pytest.raises(AdapterError) as caught:
                registry.intake.commit(staging, "fuzzed", replace=True, origin=UPLOAD)
            assert str(caught.value)
            assert isinstance(caught.value.field, str)
    still_well(registry)


def still_well(registry: AdapterRegistry) -> None:
    with registry.resolve("untouched") as lease:
        assert registry.programs.program(lease.record.digest).digest == lease.record.digest
    registry.check_integrity()
    assert registry.intake._contents.staged() == 0  # type: ignore[attr-defined]


@bounded
@given(st.sampled_from([CONFIG, WEIGHTS]), st.data())
def test_files_cut_short_or_with_flipped_bytes(
    registry: AdapterRegistry, name: str, data: st.DataObject
) -> None:
    content = bytearray(GOOD[name])
    if data.draw(st.booleans()):
        del content[data.draw(st.integers(1, len(content) - 1)) :]
    for _ in range(data.draw(st.integers(0, 4))):
        last = len(content) - 1
        at = data.draw(st.integers(0, min(last, HEADER_BYTES + 8)) | st.integers(0, last))
        content[at] = data.draw(st.integers(0, 255))
    survive(registry, GOOD | {name: bytes(content)})


@bounded
@given(st.integers(0, 2**64 - 1) | st.integers(0, 3000))
def test_header_lengths_that_lie(registry: AdapterRegistry, length: int) -> None:
    survive(registry, GOOD | {WEIGHTS: struct.pack("<Q", length) + GOOD[WEIGHTS][8:]})


entries = st.fixed_dictionaries(
    {},
    optional={
        "dtype": st.sampled_from(["F32", "F16", "BF16", "F64", "I8", "F8_E4M3"]) | values,
        "shape": st.lists(numbers, max_size=5) | values,
        "data_offsets": st.lists(st.integers(-8, 2000) | numbers, max_size=3) | values,
    },
)


@bounded
@given(st.dictionaries(places, entries | values, max_size=3), st.booleans())
def test_headers_of_any_kind(
    registry: AdapterRegistry, changes: dict[str, Any], merge: bool
) -> None:
    header = dict(HEADER)
    for name, change in changes.items():
        both = merge and isinstance(change, dict) and name in header
        header[name] = header[name] | change if both else change
    survive(registry, GOOD | {WEIGHTS: safetensors_bytes(header, DATA)})


@bounded
@given(st.lists(st.tuples(places, st.sampled_from(["drop", "rename", "nan", "huge"]), st.data())))
def test_tensors_dropped_renamed_or_not_finite(
    registry: AdapterRegistry, damage: list[tuple[str, str, st.DataObject]]
) -> None:
    weights = tensors()
    for name, kind, data in damage:
        if name not in weights:
            continue
        if kind == "drop":
            weights.pop(name)
        elif kind == "rename":
            other = data.draw(
                st.text(max_size=20).filter(lambda text: text != "__metadata__")
                | st.sampled_from(
                    [name.replace("A", "B"), name.replace("q_proj", "norm"), f"{name}.bias"]
                )
            )
            weights[other] = weights.pop(name)
        else:
            weights[name][0, 0] = float("nan") if kind == "nan" else 3e38
    survive(registry, files(weights=weights))


@bounded
@given(
    st.dictionaries(
        st.sampled_from(sorted(USED | HARMLESS | UNSUPPORTED.keys())) | st.text(max_size=8),
        values,
        min_size=1,
        max_size=4,
    )
)
def test_configs_of_any_kind(registry: AdapterRegistry, changes: dict[str, Any]) -> None:
    survive(registry, GOOD | {CONFIG: json.dumps(config(**changes)).encode()})


@bounded
@given(
    st.sampled_from(["target_modules", "exclude_modules", "layers_pattern", "alpha_pattern"]),
    patterns,
)
def test_patterns_of_any_kind(registry: AdapterRegistry, field: str, pattern: str) -> None:
    value = {pattern: 2} if field == "alpha_pattern" else pattern
    changed = config(layers_to_transform=[0, 1]) | {field: value}
    survive(registry, GOOD | {CONFIG: json.dumps(changed).encode()})


@bounded
@given(st.binary(min_size=1, max_size=200))
def test_files_of_any_bytes(registry: AdapterRegistry, data: bytes) -> None:
    survive(registry, GOOD | {WEIGHTS: data})
    survive(registry, GOOD | {CONFIG: data})


@pytest.mark.parametrize("protocol", range(6))
def test_pickles(registry: AdapterRegistry, protocol: int) -> None:
    survive(registry, GOOD | {WEIGHTS: pickle.dumps({"w": [1.0]}, protocol=protocol)})


def test_a_torch_archive(registry: AdapterRegistry, tmp_path: Path) -> None:
    torch.save(tensors(), tmp_path / "weights")
    survive(registry, GOOD | {WEIGHTS: (tmp_path / "weights").read_bytes()})


def accepted(registry: AdapterRegistry, files: list[FileSpec]) -> Staging | None:
    try:
        return registry.intake.stage(files)
    except AdapterError:
        return None


hostile = st.sampled_from(
    ["../../x", "/etc/passwd", CONFIG + "\0", f"a/{CONFIG}", ".", "", "x" * 5000, "evil.bin"]
)


@bounded
@given(
    st.lists(
        st.builds(
            FileSpec,
            st.sampled_from([CONFIG, WEIGHTS]) | hostile | st.text(max_size=20),
            st.integers(-1, 2000) | st.integers(),
            st.sampled_from([spec.sha256 for spec in specs(GOOD)]) | st.text(max_size=70),
        ),
        max_size=3,
    )
)
def test_announcements_of_any_kind(registry: AdapterRegistry, files: list[FileSpec]) -> None:
    if staging := accepted(registry, files):
        with staging:
            assert sorted(file.name for file in files) == [CONFIG, WEIGHTS]
            assert not registry.intake.check(staging).valid
    else:
        with pytest.raises(AdapterError, match=r"^[\s\S]{1,1000}$"):
            registry.intake.stage(files)
    still_well(registry)


@bounded
@given(
    st.lists(
        st.tuples(st.integers(-1, 2), st.integers(-1, 700) | st.integers(), st.binary(max_size=99)),
        max_size=5,
    )
)
def test_chunks_of_any_kind(
    registry: AdapterRegistry, chunks: list[tuple[int, int, bytes]]
) -> None:
    with registry.intake.stage(specs(GOOD)) as staging:
        for index, offset, data in chunks:
            with suppress(AdapterError):
                staging.write(index, offset, data)
        assert not registry.intake.check(staging).valid
        with pytest.raises(AdapterError):
            registry.intake.commit(staging, "fuzzed", replace=True, origin=UPLOAD)
    still_well(registry)
