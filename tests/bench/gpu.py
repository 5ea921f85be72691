"""GPU: decode steps and adapter swaps, as shares of the limits of memory and bus.

    make bench-gpu
    make bench-gpu ARGS="--layers 8 --rows 1 8 --bandwidth 3350"

Uses a random llama of 8B shape in nf4, and adapters of rank 16 on every linear of its layers. Rows
decode with an adapter each (distinct), one adapter (identical) or none (base). The floor of a step
is the time to read every weight, every adapter in use and all keys and values once; that of a swap
is the time to copy its bytes over the bus. Excludes sampling, text and gRPC. Prints a table, or
JSON lines. Writing the model takes 16 GB in the temporary folder.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM

sys.path.insert(0, str(Path(__file__).parents[1]))

from adaplex.adapters.program.primitives import LowRank
from adaplex.adapters.program.program import AdapterProgram, ModuleProgram
from adaplex.engine.batch import Batch, Chunk
from adaplex.engine.request import AdapterMode, AdapterRef
from adaplex.engine.sequence import Sequence
from adaplex.model.modules.hooks import AdaptedLinear
from rig import BLOCK, ModelRig
from tiny import byte_tokenizer

LLAMA_8B = {
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "vocab_size": 128256,
    "max_position_embeddings": 8192,
}
TINY = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": 320,
}
MIXES = ("base", "identical", "distinct")
RANK = 16
GB = 1e9


@dataclass(frozen=True)
class Point:
    """A measurement. `time` (median) and `floor` are in milliseconds."""

    what: str
    rows: int
    time: float
    floor: float

    @property
    def share(self) -> float:
        """The floor as a fraction of the time; at most 1."""
        return self.floor / self.time

    @property
    def per_second(self) -> float:
        """Rows or swaps a second."""
        return self.rows * 1000 / self.time


class Bench:
    """A random base with as many adapters as rows, all resident."""

    def __init__(self, options: argparse.Namespace, directory: Path) -> None:
        self._options = options
        fields = dict(TINY if options.tiny else LLAMA_8B)
        if options.layers:
            fields["num_hidden_layers"] = options.layers
        save_llama(directory, fields)
        self._blocks_each = -(-options.context // BLOCK)
        most = max(options.rows)
        self.rig = ModelRig(
            directory,
            options.quantization,
            triton=True,
            graphs=not options.enforce_eager,
            num_blocks=1 + most * self._blocks_each,
            arena_bytes=options.arena << 20,
        )
        first = self._program()
        self.adapters = [
            self.rig.add(replace(first, digest=f"sha256:{i}")) for i in range(max(most, 2))
        ]

    def step(self, rows: int, mix: str) -> Point:
        """Measures decode steps of `rows` rows."""
        chosen = {
            "base": [None] * rows,
            "identical": [self.adapters[0]] * rows,
            "distinct": self.adapters[:rows],
        }
        chunks = [self._row(i, adapter) for i, adapter in enumerate(chosen[mix])]
        batch = Batch(tuple(chunks))
        took = self._median(lambda: self.rig.runner.forward(batch))
        used = {"base": 0, "identical": 1, "distinct": rows}[mix]
        cached = rows * self._blocks_each * self.rig.base.kv_block_bytes(BLOCK)
        read = self._linear_bytes() + used * self.adapters[0].packed_bytes + cached
        return Point(mix, rows, took, read / self._options.bandwidth / GB * 1000)

    def swap(self) -> Point:
        """Measures the load of an adapter from host memory in place of another."""
        runner, size = self.rig.runner, self.adapters[0].packed_bytes
        digests = [adapter.digest for adapter in self.adapters[:2]]
        for digest in digests:
            runner.pack_adapter(self.rig.programs[digest])
            runner.remove_adapter(digest)
        runner.copy_adapter(digests[1], 0, size)

        def swap() -> None:
            runner.remove_adapter(digests[1])
            digests.reverse()
            runner.copy_adapter(digests[1], 0, size)

        took = self._median(swap)
        return Point("swap", 1, took, size / self._options.bus / GB * 1000)

    def _program(self) -> AdapterProgram:
        """Returns a random adapter on every linear of the layers."""
        modules = [
            ModuleProgram(
                name,
                LowRank(
                    torch.randn(RANK, module.in_features) * 0.01,
                    torch.randn(module.out_features, RANK) * 0.01,
                ),
            )
            for name, module in sorted(self.rig.base.spec.modules.items())
            if module.kind == "linear" and ".layers." in name
        ]
        return AdapterProgram("sha256:first", "lora", tuple(modules))

    def _row(self, place: int, adapter: AdapterRef | None) -> Chunk:
        """Returns a row at the end of a context that was not computed: its KV blocks are zeros."""
        assert adapter is None or adapter.mode is AdapterMode.UNMERGED
        sequence: Sequence = self.rig.sequence([3] * self._options.context, adapter)
        first = 1 + place * self._blocks_each
        sequence.blocks = list(range(first, first + self._blocks_each))
        return Chunk(sequence, self._options.context - 1, 1)

    def _linear_bytes(self) -> int:
        """Returns the bytes of the base's linears, which a step reads."""
        modules = self.rig.base.module.modules()
        return sum(m.backend.nbytes for m in modules if isinstance(m, AdaptedLinear))

    def _median(self, run: Callable[[], object]) -> float:
        """Returns the median milliseconds of a run, including the wait for the device."""
        times = []
        for _ in range(self._options.warm_up + self._options.repeats):
            started = time.perf_counter()
            run()
            if self.rig.base.device.type == "cuda":
                torch.cuda.synchronize()
            times.append((time.perf_counter() - started) * 1000)
        return statistics.median(times[self._options.warm_up :])


def save_llama(directory: Path, fields: dict[str, int]) -> None:
    """Writes a random llama in bf16."""
    config = AutoConfig.for_model("llama", **fields)
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(directory)
    byte_tokenizer().save_pretrained(directory)


def parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    """Parses the command line."""
    parser = argparse.ArgumentParser(description="decode steps and adapter swaps on a GPU")
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 8, 32, 64])
    parser.add_argument("--context", type=int, default=1024, help="tokens that a row attends to")
    parser.add_argument("--layers", type=int, default=0, help="0: as many as an 8B llama has")
    parser.add_argument("--quantization", default="nf4")
    parser.add_argument("--arena", type=int, default=8192, help="MiB")
    parser.add_argument("--bandwidth", type=float, default=4800, help="GB/s of the memory")
    parser.add_argument("--bus", type=float, default=63, help="GB/s between host and device")
    parser.add_argument("--repeats", type=int, default=30)
    parser.add_argument("--warm-up", type=int, default=5)
    parser.add_argument("--enforce-eager", action="store_true", help="no CUDA graphs")
    parser.add_argument("--tiny", action="store_true", help="a tiny model, to test the script")
    parser.add_argument("--json", action="store_true")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> None:
    """Measures, and prints the results."""
    options = parse_arguments(arguments)
    with tempfile.TemporaryDirectory() as directory:
        bench = Bench(options, Path(directory))
        points = [bench.step(rows, mix) for rows in options.rows for mix in MIXES]
        points.append(bench.swap())
    for point in points:
        if options.json:
            print(json.dumps(asdict(point) | {"share": point.share}))
            continue
        print(
            f"{point.rows:4} {point.what:10} {point.time:9.3f} ms  floor {point.floor:8.3f} ms  "
            f"{point.share:6.1%}  {point.per_second:10,.0f}/s"
        )


if __name__ == "__main__":
    main()
