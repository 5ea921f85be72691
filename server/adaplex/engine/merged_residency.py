"""MergedResidency: dense weights of base plus adapter, where requests demand them or they pay."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import TYPE_CHECKING

from adaplex.engine.adapter_cache import AdapterCache, CacheStats
from adaplex.engine.auto_merge import AutoMerge
from adaplex.engine.batch import Batch
from adaplex.engine.byte_budget import ByteBudget
from adaplex.engine.config import EngineConfig
from adaplex.engine.errors import RequestInvalid
from adaplex.engine.eviction import LoadCosts
from adaplex.engine.load_jobs import Completion, Job, LoadJobs
from adaplex.engine.merge_cost_model import FoldedShare
from adaplex.engine.observer import Observer
from adaplex.engine.request import AdapterRef
from adaplex.engine.runner import Runner
from adaplex.engine.sequence import Sequence

if TYPE_CHECKING:  # it imports torch, which the engine does not
    from adaplex.adapters.program.program import AdapterProgram


class MergedResidency:
    """One cache under a byte budget. What merging makes of an adapter is measured once."""

    def __init__(
        self,
        config: EngineConfig,
        runner: Runner,
        jobs: LoadJobs,
        observer: Observer,
        costs: LoadCosts,
    ) -> None:
        self._config, self._runner, self._jobs, self._costs = config, runner, jobs, costs
        self._observer = observer
        self._cache = AdapterCache(
            "merged",
            ByteBudget(config.merged_bytes),
            runner.remove_merged,
            observer,
            lambda _, nbytes: costs.seconds("merged", nbytes),
        )
        self._auto = AutoMerge(runner.step_costs() if config.merged_bytes else None)
        self._measuring: set[str] = set()
        """Digests of adapters whose merging is measured now."""

    @property
    def pending(self) -> int:
        """Number of adapters whose merging is measured or whose merged weights are built."""
        return self._cache.loading + len(self._measuring)

    def check(self, adapter: AdapterRef) -> None:
        """Raises RequestInvalid if the adapter can never be served merged."""
        if not self._config.merged_bytes:
            only = ""
            if adapter.traits.merged_only:
                only = f"; adapter {adapter.name} can only be served merged"
            raise RequestInvalid("mode", f"this server keeps no merged weights{only}")
        if refusal := self._too_large(adapter.digest):
            raise refusal

    def record_request(self, digest: str) -> None:
        """Records that a request that may be served merged was added."""
        if self._config.merged_bytes:
            self._observer.merged_looked_up(hit=self._cache.has(digest))

    def record_step(self, batch: Batch) -> None:
        """Records a step that ran, for `pays`."""
        self._auto.record_step(batch)

    def pays(self, digest: str) -> bool:
        """Returns True if recent steps would have been faster with the adapter merged."""
        return self._auto.pays(digest)

    def begin_step(self) -> None:
        """Ends the protections and the blocking of the last step."""
        self._cache.begin_step()

    def load(self, sequence: Sequence, digest: str) -> None:
        """Starts the next job that builds the merged weights that a waiting sequence needs."""
        if self._cache.get(digest) or self._cache.blocked or self._jobs.full(Job.BUILD):
            return
        share = self._measured_share(digest)
        if share is not None and not self._start_build(digest, share.nbytes):
            self._cache.blocked = sequence

    def build_if_it_pays(self, digest: str) -> None:
        """Builds merged weights that no sequence waits for, if that delays no other job and evicts
        no merged weights that pay.
        """
        if self._jobs.pending or self._cache.get(digest) or self._cache.blocked:
            return
        if not self._auto.has_enough_steps(digest):
            return
        share = self._measured_share(digest)
        if share is None or not self._auto.pays(digest):
            return
        if self._cache.fits_empty(share.nbytes):
            exempt = self._auto.paying(self._cache.resident)
            self._start_build(digest, share.nbytes, exempt=exempt)

    def leasable(self, digest: str) -> bool:
        """Protects merged weights in this step; returns True if a sequence may lease them now."""
        return self._cache.leasable(digest, self._config.max_bypass)

    def lease(self, digest: str, sequence: Sequence) -> None:
        """Prevents merged weights from being dropped until the sequence releases them."""
        self._cache.lease(digest, sequence)

    def release(self, digest: str, sequence: Sequence) -> None:
        """Ends the lease of a sequence, if it has one."""
        self._cache.release(digest, sequence)

    def unload(self, digest: str) -> bool:
        """Drops merged weights once no sequence leases them; returns True if they were in memory.

        The adapter is measured and judged anew before it is merged again.
        """
        self._auto.record_share(digest, None)
        self._auto.suspend(digest)
        return self._cache.unload(digest)

    def complete(self, done: Completion) -> BaseException | None:
        """Applies a completed job; returns the error of sequences that wait for the weights."""
        error = done.error
        if done.job is Job.MEASURE:
            self._measuring.remove(done.digest)
            if error is None:
                assert done.result is not None
                self._auto.record_share(done.digest, done.result)
                return self._too_large(done.digest)
        self._observer.adapter_loaded(
            cache="merged", outcome="error" if error else "ok", seconds=done.seconds
        )
        if error is None:
            entry = self._cache.get(done.digest)
            assert entry is not None
            self._costs.record("merged", entry.nbytes, done.seconds)
            self._cache.finish_load(done.digest)
            return None
        if done.job is Job.BUILD:
            self._cache.cancel_load(done.digest)
        self._auto.suspend(done.digest)
        return error

    def stats(self) -> CacheStats:
        """Returns how full the budget of merged weights is now."""
        return self._cache.stats()

    def check_integrity(self, leases: Iterable[tuple[str, Sequence]]) -> None:
        """Asserts that the cache balances."""
        self._cache.check_integrity(leases)

    def _start_build(
        self, digest: str, nbytes: int, *, exempt: Collection[str] = frozenset()
    ) -> bool:
        """Starts to build merged weights; returns False if there is no room."""
        if self._cache.reserve(digest, nbytes, exempt=exempt) is None:
            return False

        def build(program: AdapterProgram) -> None:
            built = self._runner.build_merged(program)
            assert built <= nbytes, f"merged weights take {built} bytes, not {nbytes}"

        self._jobs.submit(Job.BUILD, digest, build)
        return True

    def _measured_share(self, digest: str) -> FoldedShare | None:
        """Returns what merging makes of the adapter, None while a job measures it."""
        share = self._auto.share(digest)
        if share is None and digest not in self._measuring:
            self._measuring.add(digest)
            self._jobs.submit(Job.MEASURE, digest, self._runner.measure_merge)
        return share

    def _too_large(self, digest: str) -> RequestInvalid | None:
        share = self._auto.share(digest)
        if share is None or self._cache.fits_empty(share.nbytes):
            return None
        budget = self._cache.capacity
        return RequestInvalid(
            "mode", f"merged weights take {share.nbytes} bytes of a budget of {budget}"
        )
