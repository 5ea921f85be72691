"""How results look: JSON for programs, tables for people."""

from __future__ import annotations

import dataclasses
import json
import sys
from collections import Counter
from collections.abc import Iterable, Sequence
from datetime import datetime
from typing import Any

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from adaplex.client.adapter_types import (
    Adapter,
    AdapterEvent,
    AdapterReport,
    AdapterVersion,
    AliasTarget,
    UploadResult,
)
from adaplex.client.generation_types import Generation, TokenLogprob

PIPE_WIDTH = 200
"""Columns when the output is no terminal: wide enough to break no line of ours."""

# A model can be made to write anything; a terminal must not take it for commands.
_CONTROL = dict.fromkeys([*range(32), *range(127, 160)])
_CONTROL = {code: None for code in _CONTROL if chr(code) not in "\n\t"}


def json_text(value: Any) -> str:
    """A result, or a list of results, as JSON; times in ISO 8601."""
    return json.dumps(_plain(value), indent=2, default=_isoformat)


def table(columns: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    """Prints a table; cells are taken as they are, without markup."""
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
    """Writes new text of an answer at once, stripped of control characters on a terminal."""
    typer.echo(plain(delta) if sys.stdout.isatty() else delta, nl=False)


def plain(value: object) -> str:
    """A value as text without control characters, but for line ends and tabs."""
    return str(value).translate(_CONTROL)


def line(value: object) -> str:
    """A value as text that cannot leave its line or cell, whoever wrote it."""
    return plain(value).replace("\n", " ").replace("\t", " ")


def warnings(found: Iterable[str]) -> None:
    """Prints on standard error what is doubtful."""
    for warning in found:
        typer.echo(f"warning: {line(warning)}", err=True)


def size(count: int) -> str:
    """Bytes for people, in binary units."""
    value = float(count)
    for unit in ("B", "KiB", "MiB"):
        if value < 1024:
            return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1024
    return f"{value:.1f} GiB"


def short(digest: str) -> str:
    """Enough of a digest to tell it from others."""
    algorithm, _, digits = digest.partition(":")
    return f"{algorithm}:{digits[:12]}"


def proof(answer: Generation) -> str:
    """One line that says what answered, how much and how fast."""
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
    """Prints chosen tokens and the likeliest ones beside them."""
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


def adapters(entries: Iterable[Adapter]) -> None:
    """Prints one line for each adapter."""
    table(
        (
            *("NAME", "VERSION", "DIGEST", "FAMILY", "MODULES"),
            *("RANK", "STORED", "MEMORY", "PINNED", "LABELS"),
        ),
        [
            (
                entry.name,
                entry.version,
                short(entry.digest),
                entry.family,
                entry.modules,
                entry.max_rank,
                size(entry.stored_bytes),
                entry.tier or "unknown",
                "yes" if entry.pinned else "",
                _labels(entry),
            )
            for entry in entries
        ],
    )


def name_rows(adapter: Adapter) -> list[tuple[str, object]]:
    """What is known of an adapter's name, whatever its version."""
    return [
        ("description", adapter.description),
        ("labels", _labels(adapter)),
        ("aliases", "; ".join(f"{a} -> {_shares(t)}" for a, t in sorted(adapter.aliases.items()))),
        ("pinned", "yes" if adapter.pinned else "no"),
        ("source", adapter.source + (f", by {adapter.actor}" if adapter.actor else "")),
        ("signer", adapter.signer),
    ]


def named(adapter: Adapter) -> None:
    """Prints a name after a change to it."""
    newest = f"{adapter.name}@{adapter.version} {short(adapter.digest)}"
    fields([("newest version", newest), *name_rows(adapter)])


def versions(entries: Iterable[AdapterVersion]) -> None:
    """Prints every version of a name, newest first."""
    table(
        ("VERSION", "DIGEST", "CREATED", "STORED", "SOURCE", "BY"),
        [
            (
                entry.version,
                short(entry.digest),
                entry.create_time.isoformat(timespec="seconds"),
                size(entry.stored_bytes),
                entry.source,
                entry.actor,
            )
            for entry in reversed(list(entries))
        ],
    )


def history(events: Iterable[AdapterEvent]) -> None:
    """Prints what happened to a name."""
    table(
        ("TIME", "WHAT", "BY", "SOURCE"),
        [(e.time.isoformat(timespec="seconds"), _happened(e), e.actor, e.source) for e in events],
    )


def stored(result: UploadResult, as_json: bool) -> None:
    """Prints what was stored, and what is doubtful about it."""
    if as_json:
        typer.echo(json_text(result))
        return
    adapter = result.adapter
    said = (
        f"{adapter.name}@{adapter.version} {short(adapter.digest)} "
        f"{adapter.family} {adapter.modules} modules "
        f"({'stored' if result.created else 'was there already'})"
    )
    typer.echo(line(said))
    warnings(result.report.warnings)


def _happened(event: AdapterEvent) -> str:
    """One event in words."""
    if event.kind == "alias":
        before, after = (_shares(side) or "nothing" for side in (event.before, event.after))
        return f"alias {event.alias}: {before} -> {after} {event.detail}".rstrip()
    which = f" @{event.version} {short(event.digest)}" if event.version else ""
    return f"{event.kind}{which} {event.detail}".rstrip()


def _shares(targets: Sequence[AliasTarget]) -> str:
    """An alias's targets, in percent of requests: `@3`, or `@3 95%, @4 5%`."""
    if len(targets) == 1:
        return f"@{targets[0].version}"
    total = sum(target.weight for target in targets) or 1.0
    return ", ".join(f"@{target.version} {100 * target.weight / total:.3g}%" for target in targets)


def _labels(adapter: Adapter) -> str:
    return ", ".join(f"{key}={value}" for key, value in sorted(adapter.labels.items()))


def report(checked: AdapterReport) -> None:
    """Prints what a checkpoint says, every note and every refusal."""
    fields(
        [
            ("family", checked.family),
            ("digest", checked.digest),
            ("modules", len(checked.modules)),
            ("served as", _served(checked)),
            ("greatest rank", max((m.rank for m in checked.modules), default=0)),
            ("packed", size(checked.packed_bytes)),
            *_asked(checked),
        ]
    )
    if checked.modules:
        table(
            ("MODULE", "RANK", "SCALE", "IN", "OUT", "APPLIED"),
            [
                (
                    *(m.module, m.rank, f"{m.scale:g}", m.in_features, m.out_features),
                    ", ".join(m.primitives),
                )
                for m in checked.modules
            ],
        )
    for warning in checked.warnings:
        typer.echo(f"warning: {line(warning)}")
    for note in checked.notes:
        typer.echo(f"note: {line(note)}")
    for refusal in checked.refusals:
        typer.echo(f"refused: {line(refusal)}")


def _served(checked: AdapterReport) -> str:
    """Primitives, and at how many modules: `low-rank at 210, bias at 30`."""
    counts = Counter(name for module in checked.modules for name in module.primitives)
    return ", ".join(f"{name} at {count}" for name, count in counts.items())


def _asked(checked: AdapterReport) -> list[tuple[str, object]]:
    """What an adapter asks of its requests, where it does."""
    leading = [
        f"{count} {kind}"
        for count, kind in (
            (checked.prefix_tokens, "with keys and values of its own"),
            (checked.virtual_tokens, "virtual tokens"),
        )
        if count
    ]
    rows: list[tuple[str, object]] = []
    if leading:
        rows.append(("before the prompt", ", ".join(leading)))
    if checked.invocation_tokens:
        rows.append(("invoked by tokens", " ".join(map(str, checked.invocation_tokens))))
    if checked.merged_only:
        rows.append(("mode", "merged only"))
    return rows


def _console() -> Console:
    return Console(width=None if sys.stdout.isatty() else PIPE_WIDTH, highlight=False)


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return dataclasses.asdict(value)
    return [_plain(item) for item in value] if isinstance(value, list) else value


def _isoformat(value: object) -> str:
    if isinstance(value, datetime):
        return value.isoformat()
    raise TypeError(f"{type(value).__name__} has no place in JSON")
