"""MergedResidency: dense weights of base plus adapter, for who asks for them and where they pay."""

from __future__ import annotations

from collections.abc import Iterable
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
    """One tier under a byte budget. The runner is asked once what merging makes of an adapter."""

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
        self.popularity = AutoMerge(runner.step_costs() if config.merged_bytes else None)
        self._measuring: set[str] = set()
        """Digests of adapters whose merging is measured now."""

    def check(self, adapter: AdapterRef) -> None:
        """Raises RequestInvalid when the adapter can never be served merged."""
        if not self._config.merged_bytes:
            how = (
                f"; adapter {adapter.name} can only be served so"
                if adapter.traits.merged_only
                else ""
            )
            raise RequestInvalid("mode", f"this server keeps no merged weights{how}")
        if refusal := self._too_large(adapter.digest):
            raise refusal

    def record_request(self, digest: str) -> None:
        """A request that may be served merged has come in."""
        if self._config.merged_bytes:
            self._observer.merged_looked_up(hit=self._cache.has(digest))

    def begin_step(self) -> None:
        """Ends the protections and the blocking of the last step."""
        self._cache.begin_step()

    def pays(self, digest: str) -> bool:
        """Returns True if recent steps would have been faster with the adapter merged."""
        return self.popularity.pays(digest)

    def leasable(self, digest: str) -> bool:
        """Keeps merged weights for this step; returns True if a sequence may lease them."""
        return self._cache.leasable(digest, self._config.max_bypass)

    def lease(self, digest: str, sequence: Sequence) -> None:
        """Keeps merged weights in memory until the sequence releases them."""
        self._cache.lease(digest, sequence)

    def release(self, digest: str, sequence: Sequence) -> None:
        """Ends the lease of a sequence, if it has one."""
        self._cache.release(digest, sequence)

    def record_step(self, batch: Batch) -> None:
        """Records a step that ran, for `pays`."""
        self.popularity.note(batch)

    def load(self, sequence: Sequence, digest: str) -> None:
        """Brings the merged weights that a waiting sequence needs nearer."""
        if self._cache.get(digest) or self._cache.blocked or self._jobs.full(Job.BUILD):
            return
        merge = self._merge(digest)
        if merge is not None and not self._build(digest, merge.nbytes, keep=frozenset()):
            self._cache.blocked = sequence

    def build_if_it_pays(self, digest: str) -> None:
        """Builds merged weights that nobody waits for, if that delays no load and evicts no
        others that pay.
        """
        if self._jobs.pending or self._cache.get(digest) or self._cache.blocked:
            return
        if not self.popularity.judges(digest):
            return
        merge = self._merge(digest)
        if merge is None or not self.popularity.pays(digest):
            return
        if self._cache.fits_empty(merge.nbytes):
            self._build(digest, merge.nbytes, keep=self.popularity.paying(self._cache.resident))

    def unload(self, digest: str) -> bool:
        """Drops merged weights as soon as nobody leases them; whether they were there."""
        self.popularity.record_share(digest, None)
        self.popularity.forget(digest)
        return self._cache.unload(digest)

    def complete(self, done: Completion) -> BaseException | None:
        """Takes in what a job has done; why those who wait for merged weights must fail."""
        error = done.error
        if done.job is Job.MEASURE:
            self._measuring.remove(done.digest)
            if error is None:
                assert done.result is not None
                self.popularity.record_share(done.digest, done.result)
                return self._too_large(done.digest)
        self._observer.adapter_loaded(
            tier="merged", outcome="error" if error else "ok", seconds=done.seconds
        )
        if error is None:
            entry = self._cache.get(done.digest)
            assert entry is not None
            self._costs.note("merged", entry.nbytes, done.seconds)
            self._cache.loaded(done.digest)
            return None
        if done.job is Job.BUILD:
            self._cache.failed(done.digest)
        self.popularity.forget(done.digest)
        return error

    @property
    def pending(self) -> int:
        """Number of adapters whose merged weights are measured or built."""
        return self._cache.loading + len(self._measuring)

    def stats(self) -> CacheStats:
        """Returns how full the budget of merged weights is now."""
        return self._cache.stats()

    def check_integrity(self, leases: Iterable[tuple[str, Sequence]]) -> None:
        """Asserts that the tier balances."""
        self._cache.check_integrity(leases)

    def _build(self, digest: str, size: int, *, keep: frozenset[str]) -> bool:
        if self._cache.reserve(digest, size, keep=keep) is None:
            return False

        def build(program: AdapterProgram) -> None:
            built = self._runner.build_merged(program)
            assert built <= size, f"merged weights take {built} bytes, not {size}"

        self._jobs.submit(Job.BUILD, digest, build)
        return True

    def _merge(self, digest: str) -> FoldedShare | None:
        """What merging makes of the adapter; None while the loader finds out."""
        share = self.popularity.share(digest)
        if share is None and digest not in self._measuring:
            self._measuring.add(digest)
            self._jobs.submit(Job.MEASURE, digest, self._runner.measure_merge)
        return share

    def _too_large(self, digest: str) -> RequestInvalid | None:
        merge = self.popularity.share(digest)
        if merge is None or self._cache.fits_empty(merge.nbytes):
            return None
        budget = self._cache.capacity
        return RequestInvalid(
            "mode", f"merged weights take {merge.nbytes} bytes of a budget of {budget}"
        )
