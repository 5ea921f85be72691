"""What a long prompt does to running streams: the times between their tokens, against the median.

    make bench-long-prompt                            # the default model in nf4
    make bench-long-prompt ARGS="--streams 1,16 --tokens 4000 --max-stretch 1.5"

An engine without gRPC: streams decode, every one with its own adapter, then a prompt comes. A step
gives each stream a token, so its seconds are the time between two of them.
"""

from __future__ import annotations

import argparse
import statistics
from dataclasses import dataclass

from bench.engine import Bench, add_common, counts, keep, open_bench

SETTLED = 40
"""Steps by which the median is taken, before the prompt and after it."""
OUTPUT = 3000
"""Tokens of a stream: more than it has time for, at two tokens of the prompt a step."""


@dataclass(frozen=True)
class Beside:
    """Times in milliseconds; what the prompt stretches in multiples of the median."""

    streams: int
    median: float
    p50: float
    p99: float
    worst: float
    first_token: float
    """From the prompt's arrival."""


def main() -> None:
    """Runs the benchmark."""
    options = parsed()
    with open_bench(options, adapters=max(options.streams)) as bench:
        found = [
            shown(beside(bench, streams, options))
            for streams in options.streams
            for _ in range(options.repeats)
        ]
    keep(options, beside=found)


def beside(bench: Bench, streams: int, options: argparse.Namespace) -> Beside:
    """One long prompt beside so many streams."""
    running = [bench.request(i, options.prompt, OUTPUT) for i in range(streams)]
    for request in running:
        bench.engine.add(request)
    while sum(bool(output.tokens) for output in bench.step()[1]) < streams:
        pass
    alone = [bench.step()[0] for _ in range(SETTLED)]
    prompt = bench.request(None, options.tokens, 1)
    bench.engine.add(prompt)
    steps: list[float] = []
    done = False
    while not done:
        seconds, outputs = bench.step()
        steps.append(seconds)
        told = {output.request_id for output in outputs if output.tokens}
        done = prompt.request_id in told
        assert len(told) == streams + done, "a stream had no token"
    alone += [bench.step()[0] for _ in range(SETTLED)]
    for request in running:
        bench.engine.abort(request.request_id)
    while bench.engine.has_work:
        bench.step()
    usual, ordered = statistics.median(alone), sorted(steps)
    return Beside(
        streams=streams,
        median=1e3 * usual,
        p50=statistics.median(steps) / usual,
        p99=ordered[int(0.99 * len(ordered))] / usual,
        worst=ordered[-1] / usual,
        first_token=1e3 * sum(steps),
    )


def shown(found: Beside) -> Beside:
    """Prints a line of the table."""
    print(
        f"{found.streams:>3} streams: {found.median:>5.1f} ms a token alone; beside the prompt "
        f"{found.p50:.2f} times that in the median, {found.p99:.2f} at P99, {found.worst:.2f} at "
        f"worst; the prompt's first token after {found.first_token:.0f} ms",
        flush=True,
    )
    return found


def parsed() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--streams", type=counts, default=[1, 8, 16])
    parser.add_argument("--tokens", type=int, default=4000, help="of the long prompt")
    parser.add_argument("--repeats", type=int, default=3)
    add_common(parser)
    return parser.parse_args()


if __name__ == "__main__":
    main()
