"""The effect of a long prompt on running streams: times between their tokens, over the median.

    make bench-long-prompt                            # the default model in nf4
    make bench-long-prompt ARGS="--streams 1,16 --tokens 4000 --max-stretch 1.5"

Runs an engine without gRPC: streams decode, each with its own adapter, then a prompt arrives. Each
step generates one token of each stream, so its seconds are the time between two tokens.
"""

from __future__ import annotations

import argparse
import statistics
from dataclasses import dataclass

from bench.engine import Bench, add_common, counts, open_bench, write_json

SETTLED = 40
"""Steps over which the median is computed, before the prompt and after it."""
OUTPUT = 3000
"""Tokens of a stream: more than it generates while the prompt proceeds by two tokens a step."""


@dataclass(frozen=True)
class Beside:
    """Results of one prompt. `median` (of steps without it) and `first_token` are in milliseconds;
    `p50`, `p99` and `worst` of the steps beside it are multiples of the median.
    """

    streams: int
    median: float
    p50: float
    p99: float
    worst: float
    first_token: float
    """Time from the prompt's arrival to its first token."""


def main() -> None:
    """Runs the benchmark."""
    options = parse_arguments()
    with open_bench(options, adapters=max(options.streams)) as bench:
        found = [
            print_row(beside(bench, streams, options))
            for streams in options.streams
            for _ in range(options.repeats)
        ]
    write_json(options, beside=found)


def beside(bench: Bench, streams: int, options: argparse.Namespace) -> Beside:
    """Measures one long prompt beside `streams` streams."""
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
        with_token = {output.request_id for output in outputs if output.tokens}
        done = prompt.request_id in with_token
        assert len(with_token) == streams + done, "a stream had no token"
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


def print_row(found: Beside) -> Beside:
    """Prints a row of the table and returns its argument."""
    print(
        f"{found.streams:>3} streams: {found.median:>5.1f} ms a token alone; beside the prompt "
        f"{found.p50:.2f} times that in the median, {found.p99:.2f} at P99, {found.worst:.2f} at "
        f"worst; the prompt's first token after {found.first_token:.0f} ms",
        flush=True,
    )
    return found


def parse_arguments() -> argparse.Namespace:
    """Parses the command line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--streams", type=counts, default=[1, 8, 16])
    parser.add_argument("--tokens", type=int, default=4000, help="tokens of the long prompt")
    parser.add_argument("--repeats", type=int, default=3)
    add_common(parser)
    return parser.parse_args()


if __name__ == "__main__":
    main()
