"""Checks that an adapter's config names the base that is served.

PEFT writes `base_model_name_or_path`. A trainer may also write `base_model_fingerprint`, the value
that GetServerInfo returns for a base (SHA-256 of its config and weights before any quantization),
and `base_model_quantization`, the format of the base's linears during training (QLoRA).
"""

from __future__ import annotations

from collections.abc import Mapping
from enum import StrEnum
from typing import Any

from adaplex.adapters.program.base_spec import BaseSpec

FINGERPRINT = "base_model_fingerprint"
NAME = "base_model_name_or_path"
ADAPTERHUB_NAME = "model_name"
"""AdapterHub's field for the base's name; empty if the model was not loaded by a name."""
QUANTIZATION = "base_model_quantization"


class BasePolicy(StrEnum):
    """How an adapter that was trained on another base is treated. Wrong shapes are always
    refused.
    """

    OFF = "off"
    WARN = "warn"
    REFUSE = "refuse"


def mismatches(config: Mapping[str, Any], base: BaseSpec) -> tuple[tuple[str, str], ...]:
    """Returns (config field, how it differs from the base that is served) for each mismatch.

    A fingerprint takes precedence over a name. The parts of a bundle are checked too.
    """
    parts = config.get("parts")
    in_parts = (
        (f"parts[{i}].{field}", how)
        for i, part in enumerate(parts if isinstance(parts, list) else ())
        if isinstance(part, Mapping)
        for field, how in mismatches(part, base)
    )
    return (*_other_weights(config, base), *_other_quantization(config, base), *in_parts)


def agreement(config: Mapping[str, Any]) -> str:
    """Returns a note of how a config without mismatches identifies its base."""
    if config.get(FINGERPRINT):
        return "trained on the base that is served, by its fingerprint"
    if config.get(NAME) or config.get(ADAPTERHUB_NAME):
        return "trained on the base that is served, by its name"
    return "does not name the base that it was trained on"


def recorded_quantization(config: Mapping[str, Any]) -> tuple[str, ...]:
    """Returns a note of the base's quantization during training, if the config records it."""
    stored = config.get(QUANTIZATION)
    return (
        (f"trained on a base stored as {stored:.40}",) if isinstance(stored, str) and stored else ()
    )


def _other_weights(config: Mapping[str, Any], base: BaseSpec) -> tuple[tuple[str, str], ...]:
    declared = config.get(FINGERPRINT)
    field = NAME if config.get(NAME) else ADAPTERHUB_NAME
    name = config.get(field)
    if isinstance(declared, str) and declared and base.fingerprint:
        if declared == base.fingerprint:
            return ()
        return (
            (FINGERPRINT, f"is {declared:.80}, the base that is served has {base.fingerprint}"),
        )
    if isinstance(name, str) and name and _plain(name) not in map(_plain, base.names):
        return ((field, f"is {name!r:.200}, the base that is served is {base.name!r}"),)
    return ()


def _other_quantization(config: Mapping[str, Any], base: BaseSpec) -> tuple[tuple[str, str], ...]:
    stored = config.get(QUANTIZATION)
    if not isinstance(stored, str) or not stored or not base.quantization:
        return ()
    if stored.casefold() == base.quantization.casefold():
        return ()
    return ((QUANTIZATION, f"is {stored!r:.40}, the base that is served is {base.quantization!r}"),)


def other_base(recorded: str, base: BaseSpec) -> str:
    """Returns how the base that an adapter was checked against differs from the one served now;
    empty if it does not, or either fingerprint is unknown.
    """
    if not recorded or not base.fingerprint or recorded == base.fingerprint:
        return ""
    return f"it was checked against the base {recorded}, served now is {base.fingerprint}"


def _plain(name: str) -> str:
    """Returns a hub id, path or name in lower case, without its organisation or folder."""
    return name.rstrip("/").rpartition("/")[2].casefold()
