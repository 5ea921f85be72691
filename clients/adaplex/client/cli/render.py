"""Output of results: JSON for programs, tables for people."""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Iterable, Sequence
from datetime import datetime
from typing import Any

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from adaplex.client.generation_types import Generation, TokenLogprob

PIPE_WIDTH = 200
"""Columns if the output is not a terminal: wide enough to wrap no table."""

# Control characters, by which text of a model or another user could drive a terminal.
_CONTROL = dict.fromkeys([*range(32), *range(127, 160)])
_CONTROL = {code: None for code in _CONTROL if chr(code) not in "\n\t"}


def json_text(value: Any) -> str:
    """Formats a result, or a list of results, as JSON; times in ISO 8601."""
    return json.dumps(_plain(value), indent=2, default=_isoformat)


def table(columns: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    """Prints a table; cells are plain text without markup."""
    shown = Table(box=None, pad_edge=False, header_style="bold")
    for column in columns:
        shown.add_column(column, overflow="fold")
    for row in rows:
        shown.add_row(*(Text(line(cell)) for cell in row))
    _console().print(shown)


def fields(rows: Iterable[tuple[str, object]]) -> None:
    """Prints names and values in two columns."""
    shown = Table(box=None, pad_edge=False, show_header=False)
    shown.add_column(style="bold")
    shown.add_column(overflow="fold")
    for name, value in rows:
        shown.add_row(name, Text(line(value)))
    _console().print(shown)


def text(delta: str) -> None:
    """Writes new text of an answer, on a terminal without control characters."""
    typer.echo(plain(delta) if sys.stdout.isatty() else delta, nl=False)


def plain(value: object) -> str:
    """Returns a value as text without control characters other than line ends and tabs."""
    return str(value).translate(_CONTROL)


def line(value: object) -> str:
    """Returns a value as text of one line, which cannot break a table or forge a line."""
    return plain(value).replace("\n", " ").replace("\t", " ")


def warnings(found: Iterable[str]) -> None:
    """Prints warnings on standard error."""
    for warning in found:
        typer.echo(f"warning: {line(warning)}", err=True)


def size(count: int) -> str:
    """Formats a number of bytes in binary units."""
    value = float(count)
    for unit in ("B", "KiB", "MiB"):
        if value < 1024:
            return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1024
    return f"{value:.1f} GiB"


def short(digest: str) -> str:
    """Abbreviates a digest to 12 hex digits."""
    algorithm, _, digits = digest.partition(":")
    return f"{algorithm}:{digits[:12]}"


def proof(answer: Generation) -> str:
    """Summarizes an answer in one line: model or adapter, token counts, speed, finish reason."""
    applied = answer.adapter
    source = f"base model {answer.model}"
    if applied:
        what = f"{applied.name}@{applied.version}"
        if applied.alias not in ("", "latest"):
            what += f" (via {applied.alias})"
        if applied.components:
            parts = applied.components
            what = " + ".join(f"{part.weight:g} {part.name}@{part.version}" for part in parts)
        source = (
            f"{what} {short(applied.digest)} "
            f"{applied.mode or 'unknown mode'} {applied.modules} modules"
        )
    usage = answer.usage
    cached = f" ({usage.cached_tokens} cached)" if usage.cached_tokens else ""
    return line(
        f"{source} | {usage.prompt_tokens}{cached} + {usage.completion_tokens} tokens"
        f" | {answer.tokens_per_second:.1f} tok/s | {answer.finish_reason or 'unknown reason'}"
    )


def logprobs(entries: Iterable[TokenLogprob]) -> None:
    """Prints a table of chosen tokens and the likeliest tokens beside them."""
    table(
        ("TOKEN", "LOGPROB", "LIKELIEST"),
        [
            (
                entry.token_id,
                f"{entry.logprob:.4f}",
                ", ".join(f"{top.token_id} {top.logprob:.4f}" for top in entry.top),
            )
            for entry in entries
        ],
    )


def _console() -> Console:
    return Console(width=None if sys.stdout.isatty() else PIPE_WIDTH, highlight=False)


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return dataclasses.asdict(value)
    return [_plain(item) for item in value] if isinstance(value, list) else value


def _isoformat(value: object) -> str:
    if isinstance(value, datetime):
        return value.isoformat()
    raise TypeError(f"{type(value).__name__} cannot be written as JSON")
