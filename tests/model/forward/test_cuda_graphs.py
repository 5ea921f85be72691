"""CUDA graphs of decoding steps: replays are what was captured, bit for bit what launches give.

Without a GPU a tape stands in for torch.cuda's graphs (tests/cuda_tape.py), which holds captures to
what a device allows, and Triton's interpreter runs the kernels.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import cuda_tape
from adaplex.engine.batch import Batch, Chunk
from adaplex.engine.request import AdapterRef
from adaplex.engine.sequence import Sequence
from adaplex.model.forward.cuda_graphs import CudaGraphs, capture_for
from adaplex.model.forward.decode_steps import DecodeSteps, eager
from cuda_tape import CudaTape
from mixes import MIXES
from random_programs import anything, made
from rig import BLOCK, ModelRig, prompt

pytestmark = pytest.mark.slow


@pytest.fixture
def tape(monkeypatch: pytest.MonkeyPatch) -> CudaTape:
    return cuda_tape.install(monkeypatch)


class Graphed:
    """A rig that decodes by graphs, or by launches."""

    def __init__(self, model: Path, quantization: str = "fp32") -> None:
        self.lines: list[str] = []
        self.rig = ModelRig(model, quantization, triton=True)
        base, self._forward = self.rig.base, self.rig.runner._forward
        kernels = self._forward._kernels
        graphs = CudaGraphs(base.device, self.lines.append)
        self._graphs = DecodeSteps(base, kernels, block_tokens=BLOCK, capture=graphs)
        self._launched = DecodeSteps(base, kernels, block_tokens=BLOCK)

    def decode(self, rows: list[Sequence], *, graphs: bool = True) -> torch.Tensor:
        """Returns the next logits of rows that have one token to compute."""
        self._forward._decode = self._graphs if graphs else self._launched
        return self.rig.decode(*rows)

    def check_replay(self, rows: list[Sequence]) -> None:
        """Asserts that a replay gives the bits of launches, and writes the same to the cache."""
        cache = self.rig.base.step.cache
        assert cache is not None
        got = self.decode(rows)
        kept = [tensor.clone() for tensor in (*cache.keys, *cache.values)]
        assert torch.equal(got, self.decode(rows, graphs=False))
        assert torch.isfinite(got).all()
        assert all(map(torch.equal, kept, (*cache.keys, *cache.values)))


def sequences(rig: ModelRig, adapters: list[AdapterRef], mix: list[int | None]) -> list[Sequence]:
    """Returns the rows of a mix at their first token."""
    chosen = [None if which is None else adapters[which] for which in mix]
    return [rig.sequence(prompt(1, seed=i), adapter) for i, adapter in enumerate(chosen)]


def test_one_graph_serves_every_mix(tiny_model: Callable[[str], Path], tape: CudaTape) -> None:
    graphed = Graphed(tiny_model("llama"))
    rig = graphed.rig
    adapters = [rig.add(made(rig, rank, i)) for i, rank in enumerate((1, 2, 3, 8, 16, 5))]
    mixes = {name: mix if name == "distinct" else mix[::5] for name, mix in MIXES.items()}
    for mix in mixes.values():
        graphed.check_replay(sequences(rig, adapters, mix))
    assert [graph.replays for graph in tape.graphs] == [len(mixes)]
    assert graphed.lines == []


@pytest.mark.parametrize(
    ("architecture", "quantization"),
    [("qwen2", "bf16"), ("qwen3", "fp32"), ("gemma2", "fp32"), ("gpt2", "bf16")],
)
def test_other_architectures_are_captured_too(
    architecture: str, quantization: str, tiny_model: Callable[[str], Path], tape: CudaTape
) -> None:
    graphed = Graphed(tiny_model(architecture), quantization)
    rig = graphed.rig
    adapters = [rig.add(anything(rig, 0)), rig.add(made(rig, 3, 2))]
    rows = sequences(rig, adapters, [1, 0, None, 0])
    rig.prefill(*rows)
    for row in rows:
        row.tokens.append(9)
    graphed.check_replay(rows[:2])
    graphed.check_replay(rows[2:])
    graphed.check_replay(rows[2:3])
    assert [graph.replays for graph in tape.graphs] == [2, 1]
    assert graphed.lines == []


@pytest.mark.usefixtures("cuda_products")
@pytest.mark.parametrize("quantization", ["nf4", "int8", "int4-group", "bf16"])
def test_quantized_bases_are_captured_too(
    quantization: str, tiny_model: Callable[[str], Path], tape: CudaTape
) -> None:
    graphed = Graphed(tiny_model("llama"), quantization)
    adapters = [graphed.rig.add(made(graphed.rig, 3, 2))]
    for mix in ([None, 0], [0, None]):
        graphed.check_replay(sequences(graphed.rig, adapters, mix))
    assert [graph.replays for graph in tape.graphs] == [2]
    assert graphed.lines == []


def test_adapters_replace_each_other_between_replays(
    tiny_model: Callable[[str], Path], tape: CudaTape
) -> None:
    """In the same bytes of the arena, and with more modules than any before."""
    graphed = Graphed(tiny_model("llama"))
    rig = graphed.rig
    programs = [made(rig, 3, 9), *(anything(rig, seed) for seed in range(2))]
    for chosen in ([0], [1, 2], [2, 1], [0]):
        rig._offset = 0
        adapters = [rig.add(programs[which]) for which in chosen]
        graphed.check_replay(sequences(rig, adapters, [0, -1]))
        for which in chosen:
            rig.runner.remove_adapter(programs[which].digest)
    replays = [graph.replays for graph in tape.graphs]
    assert sum(replays) == 4
    assert replays[0] == 2, "the first adapter needs fewer kernels than the others"
    assert max(replays[1:]) == 2


def test_steps_of_many_shapes_do_not_see_each_other(
    tiny_model: Callable[[str], Path], tape: CudaTape
) -> None:
    """Graphs share their memory: one may overwrite the results of another."""
    graphed = Graphed(tiny_model("llama"))
    rig = graphed.rig
    adapters = [rig.add(made(rig, 3, 1))]
    rows = sequences(rig, adapters, [0, None, None])
    long = rig.sequence(prompt(300), adapters[0])
    for _ in range(2):
        for batch in (rows, rows[1:2], [long], rows[:1], [rows[1], long]):
            graphed.check_replay(batch)
    assert [graph.replays for graph in tape.graphs] == [2] * 5


def test_answers_are_those_of_the_reference(
    tiny_model: Callable[[str], Path], tape: CudaTape
) -> None:
    graphed, answers = Graphed(tiny_model("llama")), []
    graphed.decode(sequences(graphed.rig, [], [None]))
    for rig in (graphed.rig, ModelRig(tiny_model("llama"), native=False)):
        adapters = [None, rig.add(made(rig, 3, 2)), rig.add(anything(rig, 0))]
        rows = [rig.sequence(prompt(4 + i), adapter) for i, adapter in enumerate(adapters)]
        answers.append(rig.generate(rows, 5))
    assert answers[0] == answers[1]
    assert [graph.replays for graph in tape.graphs] == [1, 5]


def test_a_sampled_token_is_taken_before_the_next_replay(
    tiny_model: Callable[[str], Path], tape: CudaTape
) -> None:
    graphed = Graphed(tiny_model("llama"))
    rig = graphed.rig
    rows = sequences(rig, [rig.add(made(rig, 3, 1))], [0, None, 0])
    expected = graphed.decode(rows, graphs=False).argmax(-1).tolist()
    graphed.decode(rows[:1])
    sampled = rig.runner.run(Batch(tuple(Chunk(s, len(s) - 1, 1) for s in rows)))
    graphed.decode(rows[:1])
    assert [token.token for token in sampled] == expected
    assert len(tape.graphs) == 2


def test_nothing_of_python_runs_in_a_replay(
    tiny_model: Callable[[str], Path], tape: CudaTape, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not the model's modules, and no operation but the captured ones."""
    graphed = Graphed(tiny_model("llama"))
    rows = sequences(graphed.rig, [graphed.rig.add(anything(graphed.rig, 0))], [0, None])
    first = graphed.decode(rows)
    monkeypatch.setattr(type(graphed.rig.base.module), "forward", None)
    assert torch.equal(graphed.decode(rows), first)
    with pytest.raises(TypeError):
        graphed.decode(rows, graphs=False)


def test_what_cannot_be_captured_is_launched(
    tiny_model: Callable[[str], Path], tape: CudaTape
) -> None:
    """A mixture of experts reads from the device which are chosen: the capture fails, and decoding
    goes on by launches.
    """
    graphed = Graphed(tiny_model("mixtral"))
    rig = graphed.rig
    rows = sequences(rig, [rig.add(made(rig, 3, 1))], [0, None, 0])
    graphed.check_replay(rows)
    graphed.check_replay(rows[:1])
    assert tape.graphs == []
    (line,) = graphed.lines
    assert line.startswith("decoding without CUDA graphs: a step cannot be captured: ")


def test_a_server_takes_graphs_where_they_are(
    tiny_model: Callable[[str], Path], tape: CudaTape
) -> None:
    lines: list[str] = []
    base = ModelRig(tiny_model("llama"), native=False).base
    there = replace(base, device=torch.device("cuda"))
    assert capture_for(base, lines.append) is eager
    assert capture_for(there, lines.append, enforce_eager=True) is eager
    assert isinstance(capture_for(there, lines.append), CudaGraphs)
    assert lines == []
    experts = ModelRig(tiny_model("mixtral"), native=False).base
    there = replace(experts, device=torch.device("cuda"))
    assert capture_for(there, lines.append) is eager
    assert lines == ["decoding without CUDA graphs: the base is a mixture of experts"]
