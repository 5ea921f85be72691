"""The demo: serves, uploads, generates with every adapter in one batch, scrapes and drains.

`make demo` runs it. It starts one server on free loopback ports with a temporary store.
"""

from __future__ import annotations

import asyncio
import sys
import tempfile
import time
import urllib.request
from contextlib import nullcontext
from pathlib import Path

from rich.console import Console
from rich.live import Live
from rich.panel import Panel
from rich.progress import Progress
from rich.table import Table

from adaplex.client import AsyncClient, Delta, Generation
from adaplex.client.local import LocalServer, LogRecord

EXAMPLES = Path(__file__).parents[1] / "adapters" / "examples"
PROMPTS = ("What is the capital of France?", "Why is the sky blue?")
MAX_TOKENS = 64
METRICS = ("adapter_requests_total", "adapter_resident_bytes", "generation_tokens_total")

console = Console()


class StartLog:
    """Prints the server's log until it serves, and then its warnings and errors."""

    def __init__(self) -> None:
        self._starting = True

    def __call__(self, record: LogRecord) -> None:
        """Prints one record, if it is to be shown."""
        event = str(record["event"])
        self._starting = self._starting and event != "serving"
        if self._starting or record.get("level") != "info":
            console.print(f"  {event}", style="dim", highlight=False)


async def upload(client: AsyncClient, names: list[str]) -> None:
    """Uploads the example adapters, with a progress bar each."""
    with Progress(console=console) as progress:
        for name in names:
            bar = progress.add_task(f"uploading {name}")
            result = await client.adapters.upload(
                name,
                EXAMPLES / name,
                progress=lambda sent, total, bar=bar: progress.update(
                    bar, completed=sent, total=total
                ),
            )
            progress.update(
                bar,
                description=f"{name}: {result.adapter.family}, "
                f"{result.adapter.modules} modules, {result.adapter.stored_bytes // 1024} KiB",
            )


def answer_panel(prompt: str, answers: dict[str, str]) -> Panel:
    """Lays out the answers received so far, one row an adapter."""
    table = Table.grid(padding=(0, 2), expand=True)
    table.add_column()
    table.add_column(ratio=1, overflow="fold")
    for name, text in answers.items():
        table.add_row(f"[bold cyan]{name}[/]", text.strip().replace("[", "\\["))
    return Panel(table, title=f"[bold]{prompt}[/]")


async def generate_all(client: AsyncClient, prompt: str, names: list[str]) -> list[Generation]:
    """Generates with the base and every adapter at once, and shows the answers as they stream."""
    answers = dict.fromkeys(["base", *names], "")
    live = Live(console=console, refresh_per_second=12) if console.is_terminal else nullcontext()

    async def answer(name: str) -> Generation:
        adapter = None if name == "base" else name
        chat = [{"role": "user", "content": prompt}]
        async with client.stream(chat, adapter=adapter, max_tokens=MAX_TOKENS) as stream:
            async for event in stream:
                if isinstance(event, Delta):
                    answers[name] += event.text
                    if isinstance(live, Live):
                        live.update(answer_panel(prompt, answers))
            return stream.generation

    with live:
        done = await asyncio.gather(*map(answer, answers))
    if not console.is_terminal:
        console.print(answer_panel(prompt, answers))
    return list(done)


def applied_table(generations: list[Generation]) -> Table:
    """Lays out the adapter that the server applied to each answer."""
    table = Table(title="what was applied", title_justify="left", box=None)
    for heading in ("adapter", "version", "digest", "mode", "modules", "tokens", "first token"):
        table.add_column(heading)
    for generation in generations:
        applied = generation.adapter
        cells = (
            ["base", "", "", "", ""]
            if applied is None
            else [
                applied.name,
                str(applied.version),
                applied.digest[:19],
                str(applied.mode),
                str(applied.modules),
            ]
        )
        tokens = str(generation.usage.completion_tokens)
        first = f"{generation.timing.first_token_seconds * 1000:.0f} ms"
        table.add_row(*cells, tokens, first)
    return table


def scrape(http_port: int) -> list[str]:
    """Returns the lines of /metrics for METRICS."""
    url = f"http://127.0.0.1:{http_port}/metrics"
    direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with direct.open(url, timeout=10) as response:
        lines = response.read().decode().splitlines()
    return [
        line for line in lines if not line.startswith("#") and any(name in line for name in METRICS)
    ]


async def main() -> None:
    """Runs the demo and exits with the server's exit code."""
    names = sorted(path.parent.name for path in EXAMPLES.glob("*/adapter_config.json"))
    started = time.monotonic()
    with (
        tempfile.TemporaryDirectory() as store,
        LocalServer(on_log=StartLog(), store_dir=store) as server,
    ):
        await asyncio.to_thread(server.wait_ready)
        async with AsyncClient(server.target) as client:
            info = await client.server_info()
            console.print(
                f"serving {info.model.name} in {info.model.quantization} on {info.model.device} "
                f"after {time.monotonic() - started:.1f} s"
            )
            await upload(client, names)
            for prompt in PROMPTS:
                generations = await generate_all(client, prompt, names)
                tokens = sum(g.usage.completion_tokens for g in generations)
                seconds = max(g.timing.total_seconds for g in generations)
                console.print(applied_table(generations))
                console.print(f"{tokens} tokens in {seconds:.1f} s, one batch\n")
            console.print("[bold]from /metrics[/]")
            for line in await asyncio.to_thread(scrape, server.http_port):
                console.print(line, highlight=False, soft_wrap=True)
        code = server.stop()
        console.print(f"server drained, exit code {code}")
    sys.exit(code)


if __name__ == "__main__":
    asyncio.run(main())
