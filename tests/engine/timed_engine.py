"""An engine on a machine whose steps take modelled times."""

from __future__ import annotations

import random
from dataclasses import dataclass, field

from adaplex.engine.batch import Batch
from adaplex.engine.chunk_cost_model import MIN_CHUNK
from adaplex.engine.engine import Engine
from adaplex.engine.request import SampledToken
from engine.fakes import InlineExecutor, make_config, make_request
from fake_runner import FakeRunner, FakeSource

BLOCK = 16


@dataclass
class Machine:
    """Seconds of a step: fixed, per row, per prompt chunk, per token attended to, and per prompt
    chunk and token of its context.
    """

    step: float = 15e-3
    row: float = 0.8e-3
    chunk: float = 2e-3
    context: float = 2e-7
    chunk_context: float = 0.0
    noise: random.Random | None = None

    def exact(self, batch: Batch) -> float:
        chunks = sum(chunk.count > 1 for chunk in batch.chunks)
        attended = sum(c.count * (c.start + c.end) / 2 for c in batch.chunks)
        rows = batch.tokens * self.row
        ends = sum(chunk.end for chunk in batch.chunks if chunk.count > 1)
        per_chunk = chunks * self.chunk + ends * self.chunk_context
        return self.step + rows + per_chunk + attended * self.context

    def seconds(self, batch: Batch) -> float:
        exact = self.exact(batch)
        if self.noise is None:
            return exact
        outlier = 20.0 if self.noise.random() < 0.04 else 1.0
        return exact * outlier * self.noise.uniform(0.95, 1.1)


CPU = Machine()
SLOW_CONTEXT = Machine(context=1e-6)
COSTLY_CHUNKS = Machine(chunk=10e-3, row=0.4e-3)
OVERHEAD = Machine(chunk=10e-3, chunk_context=1e-5)
QUICK = Machine(step=3.4e-3, row=0.63e-3, chunk=2.2e-3, context=5e-8)
"""A step of one stream takes as long as a chunk of two or three tokens adds."""
GPU = Machine(step=8e-3, row=5e-6, chunk=1e-4, context=2e-9)
MACHINES = [CPU, SLOW_CONTEXT, COSTLY_CHUNKS, GPU]


@dataclass
class Step:
    seconds: float
    alone: float
    """Seconds that it would have taken without prompts."""
    decodes: int
    prompts: dict[str, int] = field(default_factory=dict)
    """Prompt rows by request."""


class TimedRunner(FakeRunner):
    """Advances a clock by modelled seconds, and does not check blocks."""

    def __init__(self, machine: Machine) -> None:
        super().__init__()
        self.machine = machine
        self.steps: list[Step] = []

    def run(self, batch: Batch) -> list[SampledToken]:
        seconds = self.machine.seconds(batch)
        self.now += seconds
        prompts = {c.sequence.request_id: c.count for c in batch.chunks if c.count > 1}
        decodes = tuple(chunk for chunk in batch.chunks if chunk.count == 1)
        alone = self.machine.exact(Batch(decodes))
        self.steps.append(Step(seconds, alone, len(decodes), prompts))
        for chunk in batch.chunks:
            assert chunk.end % BLOCK == 0 or chunk.samples or chunk.count % MIN_CHUNK == 0
        return [SampledToken(1) for _ in batch.sampling]


class Run:
    def __init__(self, machine: Machine, **changes: object) -> None:
        self.runner = TimedRunner(machine)
        limits = {
            "num_blocks": 4096,
            "block_tokens": BLOCK,
            "max_model_len": 8192,
            "max_running": 32,
            "max_step_tokens": 512,
            "max_chunk_tokens": 512,
            "max_stretch": 2.0,
            "prefix_cache": False,
        }
        self.engine = Engine(
            make_config(**limits | changes),
            self.runner,
            FakeSource(),
            base_digest="base",
            executor=InlineExecutor(),
            clock=lambda: self.runner.now,
        )
        self.first: dict[str, float] = {}
        """Time of the first token of each request."""

    def step(self) -> None:
        for output in self.engine.step():
            if output.tokens:
                self.first.setdefault(output.request_id, self.runner.now)

    def add(self, name: str, prompt: int, max_tokens: int = 1, **fields: object) -> None:
        self.engine.add(
            make_request(name, range(prompt), max_tokens=max_tokens, arrival=0.0, **fields)
        )

    def start_streams(self, count: int) -> None:
        for number in range(count):
            self.add(f"stream{number}", 64, max_tokens=4000)
        while len(self.first) < count:
            self.step()
        for _ in range(10):
            self.step()

    def until(self, *names: str) -> list[Step]:
        """Steps until these requests have their first tokens; returns the steps."""
        begun = len(self.runner.steps)
        while not set(names) <= self.first.keys():
            self.step()
            assert len(self.runner.steps) < begun + 5000, "the prompt does not come to an end"
        return self.runner.steps[begun:]
