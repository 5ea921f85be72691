"""Whether an adapter was trained on the base that is served, as far as it says so itself.

PEFT writes `base_model_name_or_path`. A trainer may also write `base_model_fingerprint`, the value
that GetServerInfo gives for a base: SHA-256 of its config and weights before any quantization.
"""

from __future__ import annotations

from collections.abc import Mapping
from enum import StrEnum
from typing import Any

from adaplex.adapters.program import BaseSpec

FINGERPRINT = "base_model_fingerprint"
NAME = "base_model_name_or_path"


class BasePolicy(StrEnum):
    """What to do about an adapter of another base. One whose shapes do not fit is refused."""

    OFF = "off"
    WARN = "warn"
    REFUSE = "refuse"


def mismatches(config: Mapping[str, Any], base: BaseSpec) -> tuple[tuple[str, str], ...]:
    """(config field, how it differs from the base that is served). A fingerprint beats a name."""
    declared, name = config.get(FINGERPRINT), config.get(NAME)
    if isinstance(declared, str) and declared and base.fingerprint:
        if declared == base.fingerprint:
            return ()
        return (
            (FINGERPRINT, f"is {declared:.80}, the base that is served has {base.fingerprint}"),
        )
    if isinstance(name, str) and name and _plain(name) not in map(_plain, base.names):
        return ((NAME, f"is {name!r:.200}, the base that is served is {base.name!r}"),)
    return ()


def other_base(recorded: str, base: BaseSpec) -> str:
    """How the base that an adapter was checked against differs from the one of now; or nothing."""
    if not recorded or not base.fingerprint or recorded == base.fingerprint:
        return ""
    return f"it was checked against the base {recorded}, served now is {base.fingerprint}"


def _plain(name: str) -> str:
    """A hub id, a path or a bare name, without its organisation and in one case."""
    return name.rstrip("/").rpartition("/")[2].casefold()
