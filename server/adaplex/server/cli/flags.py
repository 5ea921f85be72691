"""Flags of `adaplex serve`, one for each setting: name, values and default as text."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args, get_origin

import typer
from pydantic import ByteSize
from pydantic.fields import FieldInfo

from adaplex.server.config import ServerConfig
from adaplex.server.config_types import SECONDS

KINDS = {ByteSize: "BYTES", int: "N", float: "X", Path: "PATH", str: "TEXT"}
"""Word of help for each type of value."""


def signature() -> inspect.Signature:
    """Returns a signature with one keyword per setting. Values stay text for ServerConfig."""
    parameters = [_parameter(name, field) for name, field in ServerConfig.model_fields.items()]
    option = typer.Option(False, "--print-config", help="Print the effective settings and exit.")
    parameters.append(_keyword("print_config", bool, option))
    return inspect.Signature(parameters, return_annotation=None)


def flag_name(name: str) -> str:
    """Returns the flag of a setting."""
    return f"--{name.replace('_', '-')}"


def default_text(field: FieldInfo) -> str:
    """Returns a default for people, with `~` for the home folder; empty if there is none."""
    default = field.get_default(call_default_factory=True)
    if isinstance(default, ByteSize):
        return default.human_readable(separator="").replace(".0", "")
    if isinstance(default, bool):
        return "on" if default else "off"
    if isinstance(default, Path) and default.is_relative_to(Path.home()):
        return str(Path("~") / default.relative_to(Path.home()))
    return str(default) if default not in (None, (), {}) else ""


def choices(field: FieldInfo) -> list[str]:
    """Returns what a flag accepts: literal values, then words for the types of other values."""
    if get_origin(field.annotation) is dict:
        return ["NAME=PATH"]
    leaves = list(_leaves(field.annotation))
    literals = [str(leaf) for leaf in leaves if isinstance(leaf, str | int)]
    words = [word for kind, word in KINDS.items() if kind in leaves]
    return [*literals, *([SECONDS] if SECONDS in field.metadata else words)]


def _parameter(name: str, field: FieldInfo) -> inspect.Parameter:
    flag, default = flag_name(name), default_text(field) or False
    if field.annotation is bool:
        option = typer.Option(
            None, f"{flag}/--no-{flag[2:]}", help=field.description, show_default=default
        )
        return _keyword(name, bool | None, option)
    option = typer.Option(
        None,
        flag,
        help=field.description,
        show_default=default,
        metavar="|".join(choices(field)),
    )
    repeated = get_origin(field.annotation) in (tuple, dict)
    return _keyword(name, list[str] | None if repeated else str | None, option)


def _keyword(name: str, annotation: Any, option: Any) -> inspect.Parameter:
    return inspect.Parameter(
        name, inspect.Parameter.KEYWORD_ONLY, default=option, annotation=annotation
    )


def _leaves(annotation: Any) -> Iterator[Any]:
    """Yields the types and literals that an annotation consists of."""
    parts = get_args(annotation)
    if not parts:
        yield annotation
    for part in parts:
        yield from _leaves(part)
