"""Types of settings, how their text is parsed, and defaults that depend on the machine."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BeforeValidator, Field
from pydantic_settings import NoDecode

MIB = 1024**2
MAX_CONNECTION_AGE = 2**31 // 1000
"""Seconds; gRPC reads the age as milliseconds in a 32-bit integer."""


def default_store() -> Path:
    """Returns `adaplex/store` in the user's XDG data folder."""
    data = os.environ.get("XDG_DATA_HOME") or Path.home() / ".local" / "share"
    return Path(data) / "adaplex" / "store"


def available_cpus() -> int:
    """Returns the cores that this process may use: its affinity, within the container's quota."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        return max(1, min(cores or 1, int(quota) // int(period)))
    except (OSError, ValueError):  # no such file, or "max": no quota
        return cores or 1


def split_list(value: object) -> object:
    """Splits a comma-separated string into a list; returns any other value unchanged."""
    return [part for part in value.split(",") if part] if isinstance(value, str) else value


def parse_integer(value: object) -> object:
    """Converts decimal digits to an int; returns any other value unchanged."""
    return int(value) if isinstance(value, str) and value.isdecimal() else value


def split_pairs(value: object) -> object:
    """Converts `name=path` strings to a mapping; returns a mapping unchanged. Raises ValueError."""
    pairs = split_list(value)
    if not isinstance(pairs, list | tuple):
        return pairs
    broken = [pair for pair in pairs if "=" not in str(pair)]
    if broken:
        raise ValueError(f"{broken[0]!r} is not name=path")
    return dict(str(pair).split("=", 1) for pair in pairs)


Paths = Annotated[tuple[Path, ...], NoDecode, BeforeValidator(split_list)]
Names = Annotated[tuple[str, ...], NoDecode, BeforeValidator(split_list)]
NamedPaths = Annotated[dict[str, Path], NoDecode, BeforeValidator(split_pairs)]
GroupSize = Annotated[Literal[16, 32, 64, 128], BeforeValidator(parse_integer)]
Port = Annotated[int, Field(ge=0, le=65535)]
Count = Annotated[int, Field(ge=1)]
Share = Annotated[float, Field(ge=0, le=1)]
SECONDS = "SECONDS"
"""Marks a number of seconds; help shows it as the unit."""
Seconds = Annotated[float, SECONDS, Field(ge=0, allow_inf_nan=False)]
PositiveSeconds = Annotated[float, SECONDS, Field(gt=0, allow_inf_nan=False)]
