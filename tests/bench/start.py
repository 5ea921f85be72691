"""Seconds from `adaplex serve` to SERVING, on this machine.

    make bench-start                                     # the default model in nf4
    make bench-start ARGS="--starts 9 --quantization int8"

Each round starts the server twice on one cache folder: without saved quantized weights, which it
then saves, and with them. A first start, which does not count, loads the checkpoint and libraries
into the page cache. The server's log marks the phases.
"""

from __future__ import annotations

import argparse
import shutil
import socket
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from adaplex.client.local import LocalServer
from adaplex.model.base.source import default_cache

POLL_SECONDS = 0.01
PHASES = {
    "imports": "reading config",
    "base": "sizing the KV cache",
    "parts": "warming up",
    "trial": "serving",
}
"""Phase -> prefix of the log event that ends it."""


@dataclass(frozen=True)
class Start:
    """Seconds to SERVING, and seconds of each phase."""

    seconds: float
    phases: Mapping[str, float]


def start(settings: Mapping[str, object]) -> Start:
    """Starts a server, waits until its gRPC health says SERVING, and stops it."""
    started = time.perf_counter()
    ends: dict[str, float] = {}

    def record_end(record: Mapping[str, Any]) -> None:
        if record["level"] == "unknown":
            return  # a library's output, not the server's
        for phase, line in PHASES.items():
            if str(record["event"]).startswith(line):
                ends.setdefault(phase, time.perf_counter() - started)

    with LocalServer(on_log=record_end, **settings) as server:
        while not is_listening(server.port) and server.process.poll() is None:
            time.sleep(POLL_SECONDS)
        server.wait_ready()
        seconds = time.perf_counter() - started
    times = [0.0, *(ends[phase] for phase in PHASES)]
    return Start(seconds, dict(zip(PHASES, map(float.__sub__, times[1:], times), strict=True)))


def is_listening(port: int) -> bool:
    """True if a process listens on the port. A refused gRPC channel would wait for a second."""
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def print_row(name: str, starts: list[Start]) -> None:
    """Prints a row of the table."""
    seconds = [each.seconds for each in starts]
    phases = (median(each.phases[phase] for each in starts) for phase in PHASES)
    figures = (median(seconds), max(seconds), *phases)
    print(f"{name:<18}" + "".join(f"{figure:>9.2f}" for figure in figures), flush=True)


def main() -> None:
    """Runs the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--starts", type=int, default=5, help="starts of each kind")
    parser.add_argument("--model", default="smollm2-135m-instruct")
    parser.add_argument("--quantization", default="nf4", choices=["nf4", "int8"])
    options = parser.parse_args()
    without: list[Start] = []
    saved: list[Start] = []
    with tempfile.TemporaryDirectory() as work:
        cache = Path(work) / "cache"
        cache.mkdir()
        for kept in ("models", "kernels"):
            (cache / kept).symlink_to(default_cache() / kept)
        settings = {
            "model": options.model,
            "quantization": options.quantization,
            "cache": cache,
            "store_dir": Path(work) / "store",
        }
        start(settings)
        for _ in range(options.starts):
            shutil.rmtree(cache / "quantized")
            without.append(start(settings))
            saved.append(start(settings))
    print(f"{'quantized weights':<18}" + "".join(f"{c:>9}" for c in ("median", "worst", *PHASES)))
    print_row("none", without)
    print_row("saved", saved)


if __name__ == "__main__":
    main()
