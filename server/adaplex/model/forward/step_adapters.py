"""StepAdapters: which adapters change which rows of a step, as AdapterRows."""

from __future__ import annotations

from collections.abc import Mapping
from collections.abc import Sequence as Seq
from dataclasses import dataclass

import torch

from adaplex.engine.batch import Chunk
from adaplex.engine.request import AdapterMode
from adaplex.model.adapters.resident import ResidentAdapters
from adaplex.model.adapters.torch_rows import TorchRows, TorchRun
from adaplex.model.forward.protocol import runs_of
from adaplex.model.kernels.low_rank import LowRankKernel
from adaplex.model.linear.backend import LinearBackend
from adaplex.model.step.launch_plan import LaunchPlan
from adaplex.model.step.step_context import AdapterRows, BaseRows
from adaplex.model.step.tiles import AdapterKernels, Tile
from adaplex.model.tensors import int64_tensor
from adaplex.model.weights.adapter_weights import AdapterRun


class StepAdapters:
    """Makes AdapterRows by kernels for everything where there are such, else in torch."""

    def __init__(
        self,
        adapters: ResidentAdapters,
        modules: Mapping[str, int],
        device: torch.device,
        *,
        low_rank: LowRankKernel,
        kernels: AdapterKernels | None,
    ) -> None:
        """`modules` numbers every module of the base; `low_rank` adds deltas where there are no
        `kernels`.
        """
        self._adapters, self._modules, self._device = adapters, modules, device
        self._low_rank, self._kernels = low_rank, kernels

    def rows(
        self, chunks: Seq[Chunk], counts: Seq[int], *, padded: int, virtual: Mapping[int, int]
    ) -> AdapterRows:
        """Returns the adapters of a step that has the last `counts` rows of each chunk.
        Neighbouring rows of one adapter make a run.

        A run with all rows gets the padding too, up to row `padded`. `virtual` maps the rows of
        positions before the prompt to these positions.
        """
        runs: list[_Run] = []
        rows = sum(counts)
        for adapter, start, stop in runs_of(chunks, counts):
            if adapter is None:
                continue
            weights = self._adapters.weights(adapter)
            folded: Mapping[str, LinearBackend] = {}
            if adapter.mode is AdapterMode.MERGED:
                folded = self._adapters.folded(adapter.digest).linears
            tokens = tuple(
                (row, virtual[row] - weights.prefix_tokens)
                for row in range(start, stop)
                if row in virtual
            )
            end = padded if (start, stop) == (0, rows) else stop
            runs.append(_Run(AdapterRun(start, end, weights), folded, tokens))
        if not runs:
            return BaseRows()
        if self._kernels is not None:
            return self._kernel_rows(self._kernels, runs, padded)
        torch_runs = [run.in_torch for run in runs if run.folded or not run.run.weights.plain]
        unmerged = [run.run for run in runs if not run.folded]
        if not unmerged:
            return TorchRows(torch_runs)
        return TorchRows(torch_runs, self._low_rank.plan(unmerged, self._modules))

    def every_launch(self) -> AdapterRows | None:
        """Returns rows that launch every kernel at every module and change nothing; None where
        torch applies adapters.
        """
        if self._kernels is None:
            return None
        tiles = int64_tensor([Tile.none()], self._device).T.contiguous()
        launches = LaunchPlan.everywhere(len(self._modules))
        return self._kernels.rows(tiles, launches, max_rank=1)

    def _kernel_rows(self, kernels: AdapterKernels, runs: Seq[_Run], padded: int) -> AdapterRows:
        """Returns rows of kernels; torch multiplies by folded linears only."""
        adapter_runs = [run.run for run in runs]
        tiles = int64_tensor(kernels.tiles(adapter_runs), self._device).T.contiguous()
        tokens = dict(pair for run in runs for pair in run.virtual)
        virtual = [tokens.get(row, -1) for row in range(padded)]
        folded = TorchRows([run.in_torch for run in runs if run.folded])
        return kernels.rows(
            tiles,
            kernels.launches(adapter_runs),
            max_rank=max(run.weights.max_rank for run in adapter_runs),
            virtual=int64_tensor(virtual, self._device) if tokens else None,
            product=folded.product,
        )


@dataclass(frozen=True)
class _Run:
    """A run of one adapter, and what it does besides; see TorchRun."""

    run: AdapterRun
    folded: Mapping[str, LinearBackend]
    virtual: tuple[tuple[int, int], ...]

    @property
    def in_torch(self) -> TorchRun:
        """The run for TorchRows."""
        run = self.run
        return TorchRun(run.start, run.stop, run.weights.sites, self.folded, self.virtual)
