"""CudaTape: stands in for the graphs of torch.cuda where there is no GPU.

A capture records every operation of torch and every launch of Triton's interpreter, with the
tensors of its arguments. A replay runs those again on the same memory, and nothing else: numbers
that Python computed stay what they were. As on a device, a capture leaves no result, what needs the
host raises, and graphs of one pool overwrite each other's memory. Where there is a GPU, its own
graphs are counted instead.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from triton.runtime.interpreter import InterpretedFunction

WAITS = {
    "aten::_local_scalar_dense",
    "aten::nonzero",
    "aten::_unique2",
    "aten::equal",
    "aten::lift_fresh",
}
"""Operations that need the host's tensors, or wait for the device."""
SIGNATURE = inspect.signature(torch.cuda.graph)
Launch = Callable[..., None]


class Graph:
    """In place of torch.cuda.CUDAGraph."""

    def __init__(self) -> None:
        self.operations: list[Callable[[], None]] = []
        self.made: list[Tensor] = []
        """Results of the operations, in memory of the graph's own."""
        self.pool: list[Graph] = []
        self.replays = 0

    def replay(self) -> None:
        """Runs the recorded operations; results of other graphs of the pool are overwritten."""
        self.replays += 1
        for graph in self.pool:
            if graph is not self:
                graph.spoil()
        for operation in self.operations:
            operation()

    def spoil(self) -> None:
        """Overwrites the results with other numbers."""
        for tensor in self.made:
            if tensor.is_floating_point():
                tensor.fill_(torch.nan)
            else:
                tensor.fill_(1)

    def record(self, function: Any, args: Any, kwargs: Any) -> Any:
        """Runs an operation, and records it for replays."""
        given = {_memory(tensor) for tensor in _tensors((args, kwargs))}
        result = function(*args, **kwargs)
        outputs = _tensors(result)
        self.made += [t for t in outputs if _memory(t) not in given]

        def again() -> None:
            computed = function(*args, **kwargs)
            for to, new in zip(outputs, _tensors(computed), strict=True):
                if _memory(to) != _memory(new):
                    to.copy_(new)

        self.operations.append(again)
        return result


def _counted(tape: CudaTape) -> type[torch.cuda.CUDAGraph]:
    """Returns torch's own class, whose captured graphs are added to the tape."""

    class Counted(torch.cuda.CUDAGraph):
        replays = 0

        def capture_end(self) -> None:
            super().capture_end()
            tape.graphs.append(self)

        def replay(self) -> None:
            self.replays += 1
            super().replay()

    return Counted


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


def _memory(tensor: Tensor) -> int:
    """Returns the identity of a tensor's memory; oneDNN's weights have no address."""
    return id(tensor) if tensor.is_mkldnn else tensor.untyped_storage().data_ptr()


class Tape(TorchDispatchMode):
    """Records operations into a graph while it is active."""

    def __init__(self, graph: Graph, launch: Launch) -> None:
        super().__init__()
        self._graph, self._launch, self._launching = graph, launch, False

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        if self._launching:
            return function(*args, **(kwargs or {}))
        if function.name().partition(".")[0] in WAITS:
            raise RuntimeError(f"{function} is not permitted when stream is capturing")
        return self._graph.record(function, args, kwargs or {})

    def launch(self, kernel: Any, args: Any, kwargs: Any) -> None:
        """Records a kernel as one operation; the interpreter runs it by operations of torch."""
        self._launching = True
        self._launch(kernel, *args, **kwargs)
        self._launching = False
        self._graph.operations.append(lambda: self._launch(kernel, *args, **kwargs))


class CudaTape:
    """The captured graphs."""

    def __init__(self) -> None:
        self.graphs: list[Any] = []
        self._streams: list[Any] = [None]
        """Stack of streams; the current one is the last."""
        self._tape: Tape | None = None
        self._launch: Launch = InterpretedFunction.run

    @contextmanager
    def capture(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        """In place of torch.cuda.graph, with its arguments."""
        given = SIGNATURE.bind(*args, **kwargs).arguments
        graph, pool = given["cuda_graph"], given["pool"]
        assert given["stream"] is self._streams[-1], "the step ran on another stream before"
        with Tape(graph, self._launch) as self._tape:
            try:
                yield
            finally:
                self._tape = None
        graph.spoil()
        pool.append(graph)
        graph.pool = pool
        self.graphs.append(graph)

    def run(self, kernel: Any, *args: Any, **kwargs: Any) -> None:
        """In place of a launch by Triton."""
        if self._tape is None:
            self._launch(kernel, *args, **kwargs)
        else:
            self._tape.launch(kernel, args, kwargs)

    @contextmanager
    def on(self, stream: Any) -> Iterator[None]:
        """In place of torch.cuda.stream."""
        self._streams.append(stream)
        try:
            yield
        finally:
            assert self._streams.pop() is stream


class Stream:
    """In place of torch.cuda.Stream: every operation is synchronous."""

    def __init__(self, device: torch.device) -> None:
        pass

    def wait_stream(self, _: Stream) -> None:
        pass


def install(monkeypatch: pytest.MonkeyPatch) -> CudaTape:
    """Patches torch.cuda with a tape until the test ends."""
    tape, steps = CudaTape(), Stream(torch.device("cpu"))
    if torch.cuda.is_available():
        monkeypatch.setattr(torch.cuda, "CUDAGraph", _counted(tape))
        return tape
    monkeypatch.setattr(
        InterpretedFunction, "run", lambda kernel, *args, **kw: tape.run(kernel, *args, **kw)
    )
    for name, stand_in in {
        "Stream": Stream,
        "CUDAGraph": Graph,
        "graph": tape.capture,
        "stream": tape.on,
        "graph_pool_handle": list,
        "current_stream": lambda device: steps,
    }.items():
        monkeypatch.setattr(torch.cuda, name, stand_in)
    return tape
