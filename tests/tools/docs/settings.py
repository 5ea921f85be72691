"""server/SETTINGS.md, from ServerConfig."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any, get_args
from unittest import mock

from annotated_types import Ge, Gt, Le
from pydantic.fields import FieldInfo

from adaplex.server.cli.flags import choices, default_text, flag_name
from adaplex.server.config import ServerConfig
from tools.docs.markdown import code, page, table

SECTIONS = {
    "config": "Settings file",
    "model": "Base model",
    "host": "Network and lifecycle",
    "store_dir": "Adapter store",
    "adapters": "Adapter sources and checks",
    "adapter_mode": "Adapters in memory",
    "kv_cache_bytes": "Batching and KV cache",
    "vllm_metric_names": "Metrics and logs",
}
"""First setting of each section -> heading."""
WORDS = {
    "BYTES": "bytes",
    "N": "integer",
    "X": "number",
    "SECONDS": "seconds",
    "PATH": "path",
    "TEXT": "text",
    "NAME=PATH": "`name=path`",
}
"""Words of `adaplex serve --help` -> their meaning."""
INTRO = """\
Every setting of `adaplex serve`. A flag overrides the environment variable, which overrides the
YAML file, which overrides the default. `adaplex serve --print-config` prints the effective values
and their origins.

A flag that can be repeated is a list in YAML, or a mapping for `name=path`; its environment
variable separates values by commas. A switch such as `--prefix-cache` has the opposite
`--no-prefix-cache`, and is `true` or `false` in the environment and in YAML. Bytes may have a unit,
such as `512MiB`."""


def document() -> str:
    """Returns the page."""
    return page("Settings", INTRO, "server/adaplex/server/config.py", _sections())


def by_section() -> dict[str, list[str]]:
    """Returns the settings of each heading, in the order of ServerConfig."""
    groups: dict[str, list[str]] = {}
    heading = ""
    for name in ServerConfig.model_fields:
        heading = SECTIONS.get(name, heading)
        groups.setdefault(heading, []).append(name)
    return groups


def _sections() -> Iterator[str]:
    header = ("flag, variable, YAML key", "values", "default", "meaning")
    # The default of `store_dir` depends on this variable.
    with mock.patch.dict(os.environ):
        os.environ.pop("XDG_DATA_HOME", None)
        for heading, names in by_section().items():
            yield f"## {heading}\n\n" + table(header, map(_row, names))


def _row(name: str) -> tuple[str, str, str, str]:
    field = ServerConfig.model_fields[name]
    assert field.description is not None
    variable = f"ADAPLEX_{name.upper()}"
    key = "" if name == "config" else f"<br>{code(name)}"
    names = f"{code(flag_name(name))}<br>{code(variable)}{key}"
    meaning = field.description.replace("<", "&lt;")
    return names, _values(field), code(default_text(field)), meaning


def _values(field: FieldInfo) -> str:
    if field.annotation is bool:
        return "switch"
    literals = [choice for choice in choices(field) if choice not in WORDS]
    words = [WORDS[choice] for choice in choices(field) if choice in WORDS]
    limits = _limits(field)
    return ", ".join([*map(code, literals), *words, *([limits] if limits else [])])


def _limits(field: FieldInfo) -> str:
    """Returns the range of a number in words."""
    metadata = [*field.metadata, *_nested(field.annotation)]
    lowest = [float(m.ge) for m in metadata if isinstance(m, Ge)]
    above = [float(m.gt) for m in metadata if isinstance(m, Gt)]
    highest = [float(m.le) for m in metadata if isinstance(m, Le)]
    if lowest and highest:
        return f"{max(lowest):,.0f} to {min(highest):,.0f}"
    if lowest:
        return f"at least {max(lowest):,.0f}"
    return f"above {max(above):,.0f}" if above else ""


def _nested(annotation: Any) -> Iterator[Any]:
    """Yields the metadata of the annotated types inside a union."""
    for part in get_args(annotation):
        if isinstance(part, FieldInfo):
            yield from part.metadata
        yield from _nested(part)
