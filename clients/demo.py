"""The main job, end to end: serve, upload, ask every adapter in one batch, scrape, drain.

Run by `make demo`. Starts one server on free loopback ports with a store of its own, and stops it.
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
    """Shows what the server logs until it serves, and after that what is worse than info."""

    def __init__(self) -> None:
        self._starting = True

    def __call__(self, record: LogRecord) -> None:
        """One record of the server's log."""
        event = str(record["event"])
        self._starting = self._starting and event != "serving"
        if self._starting or record.get("level") != "info":
            console.print(f"  {event}", style="dim", highlight=False)


async def upload(client: AsyncClient, names: list[str]) -> None:
    """Sends every example adapter, with a bar for each."""
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


def answered(prompt: str, answers: dict[str, str]) -> Panel:
    """One row an adapter, as far as the answers have come."""
    table = Table.grid(padding=(0, 2), expand=True)
    table.add_column()
    table.add_column(ratio=1, overflow="fold")
    for name, text in answers.items():
        table.add_row(f"[bold cyan]{name}[/]", text.strip().replace("[", "\\["))
    return Panel(table, title=f"[bold]{prompt}[/]")


async def ask(client: AsyncClient, prompt: str, names: list[str]) -> list[Generation]:
    """Asks the base and every adapter at once and shows the answers as they stream."""
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
                        live.update(answered(prompt, answers))
            return stream.generation

    with live:
        done = await asyncio.gather(*map(answer, answers))
    if not console.is_terminal:
        console.print(answered(prompt, answers))
    return list(done)


def proof(generations: list[Generation]) -> Table:
    """What the server says it applied to each answer."""
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


def scraped(http_port: int) -> list[str]:
    """A few lines of /metrics."""
    url = f"http://127.0.0.1:{http_port}/metrics"
    with urllib.request.urlopen(url, timeout=10) as response:
        lines = response.read().decode().splitlines()
    return [
        line for line in lines if not line.startswith("#") and any(name in line for name in METRICS)
    ]


async def main() -> None:
    """The whole demo."""
    names = sorted(path.parent.name for path in EXAMPLES.glob("*/adapter_config.json"))
    begun = time.monotonic()
    with (
        tempfile.TemporaryDirectory() as store,
        LocalServer(on_log=StartLog(), store_dir=store) as server,
    ):
        await asyncio.to_thread(server.wait_ready)
        async with AsyncClient(server.target) as client:
            info = await client.server_info()
            console.print(
                f"serving {info.model.name} in {info.model.quantization} on {info.model.device} "
                f"after {time.monotonic() - begun:.1f} s"
            )
            await upload(client, names)
            for prompt in PROMPTS:
                generations = await ask(client, prompt, names)
                tokens = sum(g.usage.completion_tokens for g in generations)
                seconds = max(g.timing.total_seconds for g in generations)
                console.print(proof(generations))
                console.print(f"{tokens} tokens in {seconds:.1f} s, one batch\n")
            console.print("[bold]from /metrics[/]")
            for line in await asyncio.to_thread(scraped, server.http_port):
                console.print(line, highlight=False, soft_wrap=True)
        code = server.stop()
        console.print(f"server drained, exit code {code}")
    sys.exit(code)


if __name__ == "__main__":
    asyncio.run(main())
