"""`adaplex serve`. Its flags are the fields of ServerConfig."""

from __future__ import annotations

import asyncio
import inspect
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args, get_origin

import typer
from pydantic import ByteSize
from pydantic.fields import FieldInfo

from adaplex.server.config import ConfigError, ServerConfig
from adaplex.server.load_config import describe, load_config

METAVARS = {ByteSize: "BYTES", int: "N", float: "SECONDS", Path: "PATH", str: "TEXT"}


def serve(**options: Any) -> None:
    """Serve one base model, with an adapter per request, over gRPC."""
    print_config = options.pop("print_config", False)
    flags = {name: value for name, value in options.items() if value not in (None, [])}
    try:
        config = load_config(flags)
        if print_config:
            print(describe(config, flags))
            return
        _run(config)
    except ConfigError as error:
        _fail(str(error))


def _run(config: ServerConfig) -> None:
    """Builds and serves until a signal."""
    # Imported here: they bring torch, which --help and --print-config do without.
    from adaplex.server import logs

    logs.configure(config.log_level, config.log_format)  # before libraries that log on import

    from adaplex.adapters.errors import AdaplexError
    from adaplex.server import process
    from adaplex.server.build import build
    from adaplex.server.progress import shown_progress

    try:
        with shown_progress() as progress:
            parts = build(config, progress)
    except AdaplexError as error:
        _fail(str(error))
    with asyncio.Runner(loop_factory=_loop_factory()) as runner:
        runner.run(process.run(parts))


def _loop_factory() -> Any:
    """uvloop's event loop where there is one: almost twice the stream messages a second."""
    try:
        import uvloop
    except ImportError:  # not built for this platform
        return None
    return uvloop.new_event_loop


def _fail(message: str) -> None:
    for line in message.splitlines():
        print(f"adaplex serve: {line}", file=sys.stderr)
    raise typer.Exit(2)


def _signature() -> inspect.Signature:
    """One keyword for each field. Values stay text: ServerConfig parses what it takes."""
    parameters = [_parameter(name, field) for name, field in ServerConfig.model_fields.items()]
    show = typer.Option(False, "--print-config", help="Print the effective settings and exit.")
    parameters.append(_keyword("print_config", bool, show))
    return inspect.Signature(parameters, return_annotation=None)


def _parameter(name: str, field: FieldInfo) -> inspect.Parameter:
    flag = f"--{name.replace('_', '-')}"
    default = _shown(field.get_default(call_default_factory=True))
    if field.annotation is bool:
        option = typer.Option(
            None, f"{flag}/--no-{flag[2:]}", help=field.description, show_default=default
        )
        return _keyword(name, bool | None, option)
    option = typer.Option(
        None, flag, help=field.description, show_default=default, metavar=_metavar(field)
    )
    many = get_origin(field.annotation) in (tuple, dict)
    return _keyword(name, list[str] | None if many else str | None, option)


def _keyword(name: str, annotation: Any, option: Any) -> inspect.Parameter:
    return inspect.Parameter(
        name, inspect.Parameter.KEYWORD_ONLY, default=option, annotation=annotation
    )


def _shown(default: object) -> str | bool:
    """A default as help shows it; False shows nothing."""
    if isinstance(default, ByteSize):
        return default.human_readable(separator="").replace(".0", "")
    if isinstance(default, bool):
        return "on" if default else "off"
    return str(default) if default not in (None, (), {}) else False


def _metavar(field: FieldInfo) -> str:
    """What a flag takes, in a word: choices, or the kind of value."""
    if get_origin(field.annotation) is dict:
        return "NAME=PATH"
    leaves = list(_leaves(field.annotation))
    choices = [str(leaf) for leaf in leaves if isinstance(leaf, str | int)]
    return "|".join([*choices, *(word for kind, word in METAVARS.items() if kind in leaves)])


def _leaves(annotation: Any) -> Iterator[Any]:
    """The types and literals that an annotation is made of."""
    parts = get_args(annotation)
    if not parts:
        yield annotation
    for part in parts:
        yield from _leaves(part)


# What typer reads the flags from; mypy knows no such attribute of functions.
serve.__signature__ = _signature()  # type: ignore[attr-defined]
