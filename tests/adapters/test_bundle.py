"""Bundles: parts of any formats, each lowered by its own format, and summed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from typer import Typer
from typer.testing import CliRunner

from adaplex.adapters import formats
from adaplex.adapters.checkpoint import Checkpoint, read_checkpoint, write_checkpoint
from adaplex.adapters.errors import AdapterInvalid, AdapterTooLarge
from adaplex.adapters.formats.bundle import bundle
from adaplex.adapters.limits import AdapterLimits
from adaplex.adapters.program.program import AdapterProgram
from adaplex.server.cli.join import join as join_command
from adapters.handmade import BASE, DOWN, INNER, PREFIX, QUERY, VALUE, checkpoint, tensors

LIMITS = AdapterLimits()
NAME = {"base_model_name_or_path": "org/tiny-base"}


def ia3(*, seed: int = 0, module: str = QUERY, **fields: Any) -> Checkpoint:
    """Scales the output of one linear, or the input of the down projection."""
    generator = torch.Generator().manual_seed(seed)
    shape = (1, INNER) if module == DOWN else (BASE.modules[module].out_features, 1)
    config = {
        "peft_type": "IA3",
        "target_modules": [module],
        "feedforward_modules": [DOWN] if module == DOWN else [],
    }
    scale = torch.rand(shape, generator=generator) + 0.5
    return Checkpoint(config | fields, {f"{PREFIX}{module}.ia3_l": scale})


def lower(found: Checkpoint) -> AdapterProgram:
    return formats.lower(found, BASE, LIMITS)


def refusal(found: Checkpoint) -> AdapterInvalid:
    with pytest.raises(AdapterInvalid) as caught:
        lower(found)
    return caught.value


def test_parts_are_lowered_by_their_own_formats_and_summed() -> None:
    lora, scales = checkpoint(), ia3()
    made = lower(bundle([lora, scales]))
    parts = lower(lora), lower(scales)
    assert made.family == "hybrid"
    by_name = {module.module: module for module in made.modules}
    assert by_name[QUERY].primitives == ("low-rank", "output scale")
    for part in parts:
        for module in part.modules:
            for role, tensor in module.tensors():
                found: Tensor = dict(by_name[module.module].tensors())[role]
                torch.testing.assert_close(found, tensor.float())
    assert by_name[QUERY].scale == parts[0].modules[0].scale
    assert len(by_name) == len({m.module for part in parts for m in part.modules})


def test_two_parts_of_one_format_add() -> None:
    first, second = checkpoint(tensors(seed=1)), checkpoint(tensors(seed=2, rank=4), r=4)
    found = {m.module: m for m in lower(bundle([first, second])).modules}[VALUE].low_rank
    pairs = [{m.module: m for m in lower(part).modules}[VALUE].low_rank for part in (first, second)]
    assert found is not None
    expected = sum(pair.b.float() @ pair.a for pair in pairs if pair is not None)
    assert found.rank == 6
    torch.testing.assert_close(found.b @ found.a, expected)


def test_the_identity_is_that_of_the_parts_in_their_order() -> None:
    lora, scales = checkpoint(), ia3()
    digest = lower(bundle([lora, scales])).digest
    harmless = Checkpoint({**lora.config, "inference_mode": True}, lora.tensors)
    assert lower(bundle([harmless, scales])).digest == digest
    twice = Checkpoint({**lora.config, "lora_alpha": 8}, lora.tensors)
    orders = [lower(bundle(list(parts))).digest for parts in ((lora, twice), (twice, lora))]
    others = [lower(bundle([twice, scales])).digest, lower(bundle([scales, lora])).digest, *orders]
    assert len({digest, lower(lora).digest, *others}) == 6


def test_the_base_is_named_when_the_parts_agree() -> None:
    agreeing = bundle([checkpoint(**NAME), ia3(), ia3(**NAME)])
    assert agreeing.config["base_model_name_or_path"] == "org/tiny-base"
    other = ia3(base_model_name_or_path="org/other")
    assert "base_model_name_or_path" not in bundle([checkpoint(**NAME), other]).config


def changed(**fields: Any) -> Checkpoint:
    made = bundle([checkpoint(), ia3()])
    return Checkpoint({**made.config, **fields}, made.tensors)


def more(**extra: Tensor) -> Checkpoint:
    made = bundle([checkpoint(), ia3()])
    return Checkpoint(made.config, {**made.tensors, **extra})


X = torch.ones(2)
PARTS = bundle([checkpoint(), ia3()]).config["parts"]
BAD: dict[str, tuple[Checkpoint, str, str]] = {
    "no list": (changed(parts={}), "parts", "must be a list of 1 to 8"),
    "none": (changed(parts=[]), "parts", "must be a list of 1 to 8"),
    "too many": (changed(parts=[{}] * 9), "parts", "must be a list of 1 to 8"),
    "no object": (changed(parts=[PARTS[0], 3]), "parts[1]", "must be an object"),
    "within itself": (
        changed(parts=[PARTS[0], {"peft_type": "HYBRID"}]),
        "parts[1].peft_type",
        "a hybrid cannot contain a hybrid",
    ),
    "without tensors": (changed(parts=[*PARTS, {}]), "parts[2]", "has no tensors"),
    "unknown field": (changed(lora_alpha=1), "lora_alpha", "is not a known field of a hybrid"),
    "unknown part": (
        changed(parts=[PARTS[0], PARTS[1] | {"peft_type": "XLORA"}]),
        "parts[1].peft_type",
        "is not served",
    ),
    "bad part": (changed(parts=[PARTS[0] | {"r": 0}, PARTS[1]]), "parts[0].r", "positive integer"),
    "no part's tensor": (
        more(lone=X),
        "lone",
        "does not begin with a prefix from parts.0. to parts.1.",
    ),
    "tensor of a part too many": (more(**{"parts.2.x": X}), "parts.2.x", "does not begin with"),
    "tensor behind a zero": (more(**{"parts.00.x": X}), "parts.00.x", "does not begin with"),
}


@pytest.mark.parametrize("name", BAD)
def test_what_is_no_bundle_is_refused_by_name(name: str) -> None:
    found, where, reason = BAD[name]
    error = refusal(found)
    assert error.field == where
    assert reason in str(error)


def test_parts_whose_changes_cannot_be_added_are_refused_by_module() -> None:
    lora = checkpoint(tensors("down_proj"), target_modules=["down_proj"])
    error = refusal(bundle([lora, ia3(module=DOWN)]))
    assert error.field == DOWN
    assert "input scale would change another's low-rank" in str(error)


def test_limits_hold_for_parts() -> None:
    lora = checkpoint(tensors(rank=4), r=4)
    with pytest.raises(AdapterTooLarge, match="the limit is 3"):
        formats.lower(bundle([lora, ia3()]), BASE, AdapterLimits(max_rank=3))


# The command.


def run(*arguments: str | Path) -> Any:
    app = Typer()
    app.command()(join_command)
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def written(directory: Path, found: Checkpoint) -> Path:
    directory.mkdir()
    write_checkpoint(found, directory)
    return directory


def test_the_command_writes_the_same_files_every_time(tmp_path: Path) -> None:
    parts = [written(tmp_path / "a", checkpoint(**NAME)), written(tmp_path / "b", ia3())]
    for out in ("one", "two"):
        result = run("--out", tmp_path / out, *parts)
        assert result.exit_code == 0, result.output
    assert "2 parts" in result.output
    first, second = (
        {path.name: path.read_bytes() for path in (tmp_path / out).iterdir()}
        for out in ("one", "two")
    )
    assert first == second
    read = read_checkpoint(tmp_path / "one", LIMITS)
    assert lower(read).digest == lower(bundle([checkpoint(**NAME), ia3()])).digest


def test_the_command_says_what_is_wrong(tmp_path: Path) -> None:
    part = written(tmp_path / "a", checkpoint())
    empty = tmp_path / "empty"
    empty.mkdir()
    for arguments, reason in (
        (["--out", part, part], "is not empty"),
        (["--out", tmp_path / "out", part, empty], "the file is missing"),
        (["--out", tmp_path / "out", *[part] * 9], "must be 1 to 8 adapters, not 9"),
    ):
        result = run(*arguments)
        assert result.exit_code == 2
        assert reason in " ".join(result.output.replace("│", " ").split())
    assert not (tmp_path / "out").exists()
