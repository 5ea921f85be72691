"""adaplex compared with its peers: the same prompts, adapters and concurrency, in one run.

    make bench-peers
    make bench-peers ARGS='--systems adaplex llama.cpp-bf16 llama.cpp-q8_0 --repeats 5'

Installs the peers under the cache folder first, which takes a quarter of an hour once. Prints the
table of medians and the ratios; figures of different runs cannot be compared. Each system's module
documents its settings and their reasons. The exit code is 1 if a system is missing, unless
--allow-missing.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import signal
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path

from adaplex.model.base.source import DEFAULT_MODEL, print_progress, resolve_model

from . import inputs, report, rounds
from .adaplex import Adaplex
from .llama_cpp import LlamaCpp
from .peft import Peft
from .system import Inputs, System
from .vllm import Vllm
from .workload import CELLS, CONTEXT, GOALS, SLOTS

RANK = 16
STOPPED = 130
"""The exit code of an interrupted run, as of shells."""
SYSTEMS: dict[str, Callable[[Inputs], System]] = {
    "llama.cpp-bf16": partial(LlamaCpp, "bf16"),
    "llama.cpp-q8_0": partial(LlamaCpp, "q8_0"),
    "llama.cpp-q4_k_m": partial(LlamaCpp, "q4_k_m"),
    "vllm": Vllm,
    "peft": Peft,
}


def setting(text: str) -> tuple[str, str]:
    """Parses NAME=VALUE, a setting of `adaplex serve`."""
    name, equals, value = text.partition("=")
    if not name or not equals:
        raise argparse.ArgumentTypeError(f"{text!r} is not NAME=VALUE")
    return name, value


def parse() -> argparse.Namespace:
    """Parses the command line."""
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(prog="peers", description=__doc__, formatter_class=form)
    names, cells = ["adaplex", *SYSTEMS], [cell.name for cell in CELLS]
    parser.add_argument("--systems", nargs="+", choices=names, default=names)
    parser.add_argument("--cells", nargs="+", choices=cells, default=cells)
    parser.add_argument("--repeats", type=int, default=3, help="rounds over all systems")
    parser.add_argument("--model", default=DEFAULT_MODEL)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument(
        "--serve",
        type=setting,
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="a setting of `adaplex serve`, such as quantization=int8",
    )
    parser.add_argument("--allow-missing", action="store_true")
    parser.add_argument("--json", type=Path, help="write all figures to this file")
    parser.add_argument("--logs", type=Path, help="write the servers' output to this folder")
    return parser.parse_args()


async def measure(options: argparse.Namespace, logs: Path) -> rounds.Results:
    """Installs the systems and runs all rounds. SIGTERM stops everything, as Ctrl-C does."""
    task = asyncio.current_task()
    assert task is not None
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, task.cancel)
    model = resolve_model(options.model)
    given = Inputs(
        model=model,
        adapters=inputs.adapters(model, SLOTS, RANK),
        rank=RANK,
        threads=options.threads,
        slots=SLOTS,
        context=CONTEXT,
        logs=logs,
    )
    ours = partial(Adaplex, dict(options.serve))
    systems = [SYSTEMS.get(name, ours)(given) for name in options.systems]
    cells = [cell for cell in CELLS if cell.name in options.cells]
    found = rounds.Results()
    rounds.prepare(systems, found, print_progress)
    await rounds.run(systems, cells, options.repeats, found, print_progress)
    print(report.text(options.systems, cells, GOALS, found))
    if options.json:
        options.json.write_text(json.dumps(report.record(cells, found), indent=1) + "\n")
    return found


def main() -> int:
    """Runs the benchmark."""
    options = parse()
    with tempfile.TemporaryDirectory() as folder:
        logs = options.logs or Path(folder)
        logs.mkdir(parents=True, exist_ok=True)
        try:
            found = asyncio.run(measure(options, logs))
        except (KeyboardInterrupt, asyncio.CancelledError):
            return STOPPED
    return 1 if found.missing and not options.allow_missing else 0


if __name__ == "__main__":
    sys.exit(main())
