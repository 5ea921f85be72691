"""LoRA adapters of mixed ranks, targets and biases, saved by PEFT and lowered for a base."""

from __future__ import annotations

from dataclasses import dataclass
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


def save_spread(
    model: Path, base: BaseSpec, architecture: str, work: Path
) -> dict[str, SpreadAdapter]:
    """Saves every adapter of the architecture's spread into a folder of `work`; by name."""
    adapters = {}
    for seed, (name, fields) in enumerate(spread(architecture).items()):
        directory = save_adapter(load_plain(model), work / name, seed=seed, **fields)
        adapters[name] = SpreadAdapter(name, directory, lowered(directory, base))
    return adapters
