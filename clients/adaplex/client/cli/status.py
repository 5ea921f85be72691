"""`adaplex status`: the server's base model, capacity and load."""

from __future__ import annotations

import typer

from adaplex.client.cli import render
from adaplex.client.cli.app import connect
from adaplex.client.cli.arguments import AsJson
from adaplex.client.types import BaseModelInfo, ServerInfo


def status(
    context: typer.Context,
    as_json: AsJson = False,
) -> None:
    """Show the server's base model, capacity and load."""
    with connect(context) as client:
        info = client.server_info()
    if as_json:
        typer.echo(render.json_text(info))
    else:
        render.fields(_rows(info))


def _rows(info: ServerInfo) -> list[tuple[str, object]]:
    model, capacity, limits = info.model, info.capacity, info.limits
    return [
        ("version", info.version),
        ("uptime", f"{info.uptime_seconds:.0f} s"),
        ("model", f"{model.name} ({model.architecture})"),
        ("weights", _weights(model)),
        ("compute", f"{model.compute_dtype} on {model.device}"),
        ("base digest", model.digest),
        ("base fingerprint", model.fingerprint),
        ("context", f"{model.max_model_len} tokens"),
        ("running", f"{capacity.requests_running} of {limits.max_concurrent_sequences}"),
        ("waiting", f"{capacity.requests_waiting} of {limits.max_waiting_requests}"),
        (
            "kv blocks",
            f"{capacity.kv_blocks_used} of {capacity.kv_blocks_total}, "
            f"{capacity.kv_block_tokens} tokens each",
        ),
        ("adapters", f"{capacity.adapters_resident} in memory, {capacity.adapters_stored} stored"),
        ("arena", _share(capacity.arena_bytes_used, capacity.arena_bytes_total)),
        ("pinned", _share(capacity.pinned_bytes_used, capacity.pinned_bytes_total)),
        ("host", _share(capacity.host_bytes_used, capacity.host_bytes_total)),
        ("store", _share(capacity.store_bytes_used, capacity.store_bytes_total)),
        ("merged", _share(capacity.merged_bytes_used, capacity.merged_bytes_total)),
        (
            "adapter limits",
            f"{render.size(limits.max_adapter_bytes)}, rank {limits.max_adapter_rank}",
        ),
    ]


def _weights(model: BaseModelInfo) -> str:
    grouped = f", groups of {model.group_size}" if model.group_size else ""
    return f"{model.quantization}{grouped}, {render.size(model.weight_bytes)}"


def _share(used: int, total: int) -> str:
    return f"{render.size(used)} of {render.size(total)}"
