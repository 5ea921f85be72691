"""LoRA checkpoints of random weights, written without torch."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from pathlib import Path

from adaplex.client.types import AdaptableModule

WEIGHTS = "adapter_model.safetensors"
_EXPONENT = bytes(0x3C | (byte & 0x80) for byte in range(256))
"""Maps the high byte of a bf16 to one of the same sign and a magnitude of 2**-7 to 2**-5."""


def linears(modules: Sequence[AdaptableModule]) -> list[AdaptableModule]:
    """Returns the modules of PEFT's `all-linear`. Raises ValueError if there are none."""
    found = [module for module in modules if module.kind == "linear" and not module.is_head]
    if not found:
        raise ValueError("modules: the server names no linear that an adapter may change")
    return found


def write_checkpoint(
    directory: Path, modules: Sequence[AdaptableModule], rank: int, seed: int
) -> Path:
    """Writes a bf16 LoRA of the rank on all linears, as PEFT would, and returns its directory."""
    rng = random.Random(seed)
    targets = linears(modules)
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": rank,
        "lora_alpha": rank,
        "target_modules": sorted({module.name.rpartition(".")[2] for module in targets}),
    }
    header: dict[str, object] = {}
    offset = 0
    for module in targets:
        shapes = {"A": (rank, module.in_features), "B": (module.out_features, rank)}
        for part, shape in shapes.items():
            end = offset + 2 * shape[0] * shape[1]
            header[f"base_model.model.{module.name}.lora_{part}.weight"] = {
                "dtype": "BF16",
                "shape": shape,
                "data_offsets": (offset, end),
            }
            offset = end
    data = bytearray(rng.randbytes(offset))
    data[1::2] = data[1::2].translate(_EXPONENT)
    directory.mkdir(parents=True, exist_ok=True)
    encoded = json.dumps(header).encode()
    encoded += b" " * (-len(encoded) % 8)
    with (directory / WEIGHTS).open("wb") as file:
        file.write(len(encoded).to_bytes(8, "little") + encoded + data)
    (directory / "adapter_config.json").write_text(json.dumps(config))
    return directory


def perturb_weights(directory: Path, rng: random.Random) -> None:
    """Changes the adapter's content by the low bytes of its last four weights, which is cheap."""
    with (directory / WEIGHTS).open("r+b") as file:
        for offset in (-8, -6, -4, -2):  # low bytes: no exponent changes by more than one
            file.seek(offset, 2)
            file.write(rng.randbytes(1))
