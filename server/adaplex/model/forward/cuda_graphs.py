"""CudaGraphs: a step of many launches as one, on CUDA devices.

Source of the calls and their conditions: torch's notes on CUDA semantics, "CUDA Graphs".
"""

from __future__ import annotations

import torch

from adaplex.model.base.loader import BaseModel
from adaplex.model.forward.decode_steps import Capture, Replay, eager
from adaplex.model.progress import Progress, silent


class CudaGraphs:
    """A Capture. Its graphs share memory, so the logits of one are valid until another runs."""

    def __init__(self, device: torch.device, progress: Progress = silent) -> None:
        """`progress` is called if steps have to be launched kernel by kernel after all."""
        self._device, self._progress = device, progress
        self._stream = torch.cuda.Stream(device)
        self._pool = torch.cuda.graph_pool_handle()
        self._captures = True

    def __call__(self, step: Replay) -> Replay:
        """See Capture. After one step that cannot be captured, every step is launched eagerly."""
        if self._captures:
            try:
                return self._captured(step)
            except RuntimeError as error:  # what torch and CUDA raise
                self._captures = False
                self._progress(f"decoding without CUDA graphs: a step cannot be captured: {error}")
        return step

    def _captured(self, step: Replay) -> Replay:
        """Captures a step, after running it once: nothing may compile, load or autotune within a
        capture.
        """
        current, graph = torch.cuda.current_stream(self._device), torch.cuda.CUDAGraph()
        self._stream.wait_stream(current)
        # A capture that fails leaves its stream current; this context restores the one before.
        with torch.cuda.stream(self._stream):
            step()
            # Other threads copy adapters meanwhile, which "global" forbids.
            with torch.cuda.graph(
                graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"
            ):
                logits = step()
        current.wait_stream(self._stream)

        def replay() -> torch.Tensor:
            graph.replay()
            return logits

        return replay


def capture_for(base: BaseModel, progress: Progress, *, enforce_eager: bool = False) -> Capture:
    """Returns how decoding steps of a base are captured: as CUDA graphs on a CUDA device.

    A mixture of experts reads from the device in every layer which experts are chosen, so it cannot
    be captured.
    """
    if enforce_eager or base.device.type != "cuda":
        return eager
    if any(module.kind == "experts" for module in base.spec.modules.values()):
        progress("decoding without CUDA graphs: the base is a mixture of experts")
        return eager
    return CudaGraphs(base.device, progress)
