"""Instruction sets: which code of the C kernels a processor can run."""

from __future__ import annotations

import os
from dataclasses import dataclass
from functools import cache
from pathlib import Path

VARIABLE = "ADAPLEX_INSTRUCTION_SET"
"""Environment variable that names a lower set than the best one of the processor."""


@dataclass(frozen=True)
class InstructionSet:
    """Compiler flags, and the processor features that their code needs."""

    name: str
    needs: frozenset[str]
    flags: tuple[str, ...]

    @property
    def usable(self) -> bool:
        """True if this processor has all needed features."""
        return self.needs <= processor_features()


INTEL = "GenuineIntel"
"""Vendor whose processors multiply bf16 pairs at no more than the speed of fp32, and widen them."""
_AVX512 = frozenset({"avx512f", "avx512bw", "avx512vl", "avx512dq", "avx2", "fma"})
_AVX512_FLAGS = (
    *("-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq"),
    *("-mavx2", "-mfma", "-mprefer-vector-width=512"),
)
INSTRUCTION_SETS: tuple[InstructionSet, ...] = (
    InstructionSet(
        "avx512-bf16",
        _AVX512 | {"avx512_bf16", "avx512_vnni"},
        (*_AVX512_FLAGS, "-mavx512bf16", "-mavx512vnni"),
    ),
    InstructionSet("avx512-vnni", _AVX512 | {"avx512_vnni"}, (*_AVX512_FLAGS, "-mavx512vnni")),
    InstructionSet("avx512", _AVX512, _AVX512_FLAGS),
    InstructionSet("avx2", frozenset({"avx2", "fma"}), ("-mavx2", "-mfma")),
    InstructionSet("portable", frozenset(), ()),
)
"""Fastest first, by AMD's processors. `portable` is SSE2 on x86-64 and NEON on aarch64."""


class UnknownInstructionSet(ValueError):
    """ADAPLEX_INSTRUCTION_SET names a set that does not exist or that this processor lacks."""


def usable_sets() -> list[InstructionSet]:
    """Returns the sets that this processor can run, fastest first: on Intel's, AVX512-BF16 after
    the others of AVX512.
    """
    usable = [each for each in INSTRUCTION_SETS if each.usable]
    if processor_vendor() == INTEL:
        usable.sort(key=lambda each: (not each.name.startswith("avx512"), "bf16" in each.name))
    return usable


def chosen_set() -> InstructionSet:
    """Returns the fastest usable set, or the one that ADAPLEX_INSTRUCTION_SET names. Raises
    UnknownInstructionSet.
    """
    usable = usable_sets()
    name = os.environ.get(VARIABLE)
    if not name:
        return usable[0]
    for each in usable:
        if each.name == name:
            return each
    names = ", ".join(each.name for each in usable)
    raise UnknownInstructionSet(f"{VARIABLE} is {name!r}; this processor can run: {names}")


def processor_features() -> frozenset[str]:
    """Returns the features of the processor by their names in /proc/cpuinfo; empty if not Linux."""
    return frozenset((_cpuinfo("flags") or _cpuinfo("Features")).split())


def processor_vendor() -> str:
    """Returns the vendor of the processor by /proc/cpuinfo, empty if it is not told."""
    return _cpuinfo("vendor_id")


@cache
def _cpuinfo(field: str) -> str:
    """Returns a field of the first processor in /proc/cpuinfo, empty if it is not there."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:  # not Linux
        return ""
    pairs = (line.partition(":") for line in lines)
    return next((value.strip() for name, _, value in pairs if name.strip() == field), "")
