"""LoRA adapters of mixed ranks, targets and biases, saved by PEFT and lowered for a base."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from pathlib import Path

from adaplex.adapters.program.base_spec import BaseSpec
from adaplex.adapters.program.program import AdapterProgram
from peft_adapters import load_plain, save_adapter, spread
from rig import lowered


@dataclass(frozen=True)
class SpreadAdapter:
    """One adapter of the spread."""

    name: str
    directory: Path
    """As PEFT saved it."""
    program: AdapterProgram


def spread_adapters(model: Path, base: BaseSpec, architecture: str) -> dict[str, SpreadAdapter]:
    """Returns every adapter of the architecture's spread, lowered for the base; by name."""
    return {
        name: SpreadAdapter(name, directory, lowered(directory, base))
        for name, directory in saved_spread(model, architecture).items()
    }


@cache
def saved_spread(model: Path, architecture: str) -> dict[str, Path]:
    """Saves the spread beside the model's folder, once a session; adapter's name -> directory."""
    base, work = load_plain(model), model.with_name(f"{model.name}-spread")
    return {
        name: save_adapter(base, work / name, seed=seed, **fields)
        for seed, (name, fields) in enumerate(spread(architecture).items())
    }
