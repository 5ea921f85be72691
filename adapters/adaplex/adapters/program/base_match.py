"""Whether an adapter was trained on the base that is served, as far as it says so itself.

PEFT writes `base_model_name_or_path`. A trainer may also write `base_model_fingerprint`, the value
that GetServerInfo gives for a base: SHA-256 of its config and weights before any quantization; and
`base_model_quantization`, how the base's linears were kept while the adapter was trained (QLoRA).
"""

from __future__ import annotations

from collections.abc import Mapping
from enum import StrEnum
from typing import Any

from adaplex.adapters.program.base_spec import BaseSpec

FINGERPRINT = "base_model_fingerprint"
NAME = "base_model_name_or_path"
ADAPTERHUB_NAME = "model_name"
"""As AdapterHub calls the other; empty where the model was not loaded by a name."""
QUANTIZATION = "base_model_quantization"


class BasePolicy(StrEnum):
    """What to do about an adapter of another base. One whose shapes do not fit is refused."""

    OFF = "off"
    WARN = "warn"
    REFUSE = "refuse"


def mismatches(config: Mapping[str, Any], base: BaseSpec) -> tuple[tuple[str, str], ...]:
    """(config field, how it differs from the base that is served). A fingerprint beats a name.

    Of a hybrid, the parts' fields too.
    """
    parts = config.get("parts")
    within = (
        (f"parts[{i}].{field}", how)
        for i, part in enumerate(parts if isinstance(parts, list) else ())
        if isinstance(part, Mapping)
        for field, how in mismatches(part, base)
    )
    return (*_other_weights(config, base), *_other_quantization(config, base), *within)


def agreement(config: Mapping[str, Any]) -> str:
    """A note of how a config that has no mismatches says which base it is for."""
    if config.get(FINGERPRINT):
        return "trained on the base that is served, by its fingerprint"
    if config.get(NAME) or config.get(ADAPTERHUB_NAME):
        return "trained on the base that is served, by its name"
    return "does not say which base it was trained on"


def recorded_quantization(config: Mapping[str, Any]) -> tuple[str, ...]:
    """A note of how the base was kept in training, where the config says it."""
    kept = config.get(QUANTIZATION)
    return (f"trained on a base kept as {kept:.40}",) if isinstance(kept, str) and kept else ()


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
    kept = config.get(QUANTIZATION)
    if not isinstance(kept, str) or not kept or not base.quantization:
        return ()
    if kept.casefold() == base.quantization.casefold():
        return ()
    return ((QUANTIZATION, f"is {kept!r:.40}, the base that is served is {base.quantization!r}"),)


def other_base(recorded: str, base: BaseSpec) -> str:
    """How the base that an adapter was checked against differs from the one of now; or nothing."""
    if not recorded or not base.fingerprint or recorded == base.fingerprint:
        return ""
    return f"it was checked against the base {recorded}, served now is {base.fingerprint}"


def _plain(name: str) -> str:
    """A hub id, a path or a bare name, without its organisation and in one case."""
    return name.rstrip("/").rpartition("/")[2].casefold()
