"""Tables of adapters, versions, history and reports, for people."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence

import typer

from adaplex.client.adapter_types import (
    Adapter,
    AdapterEvent,
    AdapterReport,
    AdapterVersion,
    AliasTarget,
    UploadResult,
)
from adaplex.client.cli import render


def adapters(entries: Iterable[Adapter]) -> None:
    """Prints a table with one row an adapter."""
    render.table(
        (
            *("NAME", "VERSION", "DIGEST", "FAMILY", "MODULES"),
            *("RANK", "STORED", "MEMORY", "PINNED", "LABELS"),
        ),
        [
            (
                entry.name,
                entry.version,
                render.short(entry.digest),
                entry.family,
                entry.modules,
                entry.max_rank,
                render.size(entry.stored_bytes),
                entry.tier or "unknown",
                "yes" if entry.pinned else "",
                _labels(entry),
            )
            for entry in entries
        ],
    )


def name_rows(adapter: Adapter) -> list[tuple[str, object]]:
    """Returns titles and values of the metadata that all versions of a name share."""
    return [
        ("description", adapter.description),
        ("labels", _labels(adapter)),
        ("aliases", "; ".join(f"{a} -> {_shares(t)}" for a, t in sorted(adapter.aliases.items()))),
        ("pinned", "yes" if adapter.pinned else "no"),
        ("source", adapter.source + (f", by {adapter.actor}" if adapter.actor else "")),
        ("signer", adapter.signer),
    ]


def name_summary(adapter: Adapter) -> None:
    """Prints a name's newest version and its metadata."""
    newest = f"{adapter.name}@{adapter.version} {render.short(adapter.digest)}"
    render.fields([("newest version", newest), *name_rows(adapter)])


def versions(entries: Iterable[AdapterVersion]) -> None:
    """Prints a table of a name's versions, newest first; `entries` are oldest first."""
    render.table(
        ("VERSION", "DIGEST", "CREATED", "STORED", "SOURCE", "BY"),
        [
            (
                entry.version,
                render.short(entry.digest),
                entry.create_time.isoformat(timespec="seconds"),
                render.size(entry.stored_bytes),
                entry.source,
                entry.actor,
            )
            for entry in reversed(list(entries))
        ],
    )


def history(events: Iterable[AdapterEvent]) -> None:
    """Prints a table of the changes of a name."""
    render.table(
        ("TIME", "WHAT", "BY", "SOURCE"),
        [(e.time.isoformat(timespec="seconds"), _event_text(e), e.actor, e.source) for e in events],
    )


def upload_result(result: UploadResult, as_json: bool) -> None:
    """Prints a stored adapter, and the warnings about it on standard error."""
    if as_json:
        typer.echo(render.json_text(result))
        return
    adapter = result.adapter
    summary = (
        f"{adapter.name}@{adapter.version} {render.short(adapter.digest)} "
        f"{adapter.family} {adapter.modules} modules "
        f"({'stored' if result.created else 'was there already'})"
    )
    typer.echo(render.line(summary))
    render.warnings(result.report.warnings)


def _event_text(event: AdapterEvent) -> str:
    """Describes one event."""
    if event.kind == "alias":
        before, after = (_shares(side) or "nothing" for side in (event.before, event.after))
        return f"alias {event.alias}: {before} -> {after} {event.detail}".rstrip()
    which = f" @{event.version} {render.short(event.digest)}" if event.version else ""
    return f"{event.kind}{which} {event.detail}".rstrip()


def _shares(targets: Sequence[AliasTarget]) -> str:
    """Formats an alias's targets in percent of requests: `@3`, or `@3 95%, @4 5%`."""
    if len(targets) == 1:
        return f"@{targets[0].version}"
    total = sum(target.weight for target in targets) or 1.0
    return ", ".join(f"@{target.version} {100 * target.weight / total:.3g}%" for target in targets)


def _labels(adapter: Adapter) -> str:
    return ", ".join(f"{key}={value}" for key, value in sorted(adapter.labels.items()))


def report(checked: AdapterReport) -> None:
    """Prints the report of a checkpoint, with every warning, note and refusal."""
    render.fields(
        [
            ("family", checked.family),
            ("digest", checked.digest),
            ("modules", len(checked.modules)),
            ("served as", _primitive_counts(checked)),
            ("greatest rank", max((m.rank for m in checked.modules), default=0)),
            ("packed", render.size(checked.packed_bytes)),
            *_request_rows(checked),
        ]
    )
    if checked.modules:
        render.table(
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
        typer.echo(f"warning: {render.line(warning)}")
    for note in checked.notes:
        typer.echo(f"note: {render.line(note)}")
    for refusal in checked.refusals:
        typer.echo(f"refused: {render.line(refusal)}")


def _primitive_counts(checked: AdapterReport) -> str:
    """Counts the modules of each primitive: `low-rank at 210, bias at 30`."""
    counts = Counter(name for module in checked.modules for name in module.primitives)
    return ", ".join(f"{name} at {count}" for name, count in counts.items())


def _request_rows(checked: AdapterReport) -> list[tuple[str, object]]:
    """Returns rows for leading positions, invocation tokens and merged-only mode, where there are
    any.
    """
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
        rows.append(("mode", f"merged only, in {render.size(checked.merged_bytes)}"))
    return rows
