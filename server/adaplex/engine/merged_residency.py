"""MergedResidency: dense weights of base plus adapter, for who asks for them and where they pay."""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial

from adaplex.engine.adapter_cache import AdapterCache
from adaplex.engine.auto_merge import AutoMerge
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


class MergedResidency:
    """One tier under a byte budget. The runner is asked once what merging makes of an adapter."""

    def __init__(
        self,
        config: EngineConfig,
        runner: Runner,
        loader: LoadJobs,
        observer: Observer,
        costs: LoadCosts,
    ) -> None:
        self._config, self._runner, self._loader, self._costs = config, runner, loader, costs
        self._observer = observer
        self.tier = AdapterCache(
            "merged",
            ByteBudget(config.merged_bytes),
            runner.remove_merged,
            observer,
            lambda _, nbytes: costs.seconds("merged", nbytes),
        )
        self.popularity = AutoMerge(runner.step_costs() if config.merged_bytes else None)
        self._merges: dict[str, FoldedShare | None] = {}
        """What merging makes of adapters; None while that is being asked for."""

    def check(self, adapter: AdapterRef) -> None:
        """Raises RequestInvalid when the adapter can never be served merged."""
        if not self._config.merged_bytes:
            how = f"; adapter {adapter.name} can only be served so" if adapter.merged_only else ""
            raise RequestInvalid("mode", f"this server keeps no merged weights{how}")
        if refusal := self._too_large(adapter.digest):
            raise refusal

    def note(self, digest: str) -> None:
        """A request that may be served merged has come in."""
        if self._config.merged_bytes:
            self._observer.merged_looked_up(hit=self.tier.has(digest))

    def bring(self, sequence: Sequence, digest: str) -> None:
        """Brings the merged weights that a waiting sequence needs nearer."""
        if self.tier.get(digest) or self.tier.blocked or self._loader.full(Job.BUILD):
            return
        merge = self._merge(digest)
        if merge is not None and not self._build(digest, merge.nbytes, keep=frozenset()):
            self.tier.blocked = sequence

    def build_if_it_pays(self, digest: str) -> None:
        """Builds merged weights that nobody waits for, if that delays no load and evicts no
        others that pay.
        """
        if self._loader.pending or self.tier.get(digest) or self.tier.blocked:
            return
        if not self.popularity.judges(digest):
            return
        merge = self._merge(digest)
        if merge is None or not self.popularity.pays(digest):
            return
        if self.tier.space.could_hold(merge.nbytes):
            self._build(digest, merge.nbytes, keep=self.popularity.paying(self.tier.resident))

    def unload(self, digest: str) -> bool:
        """Drops merged weights as soon as nobody leases them; whether they were there."""
        if self._merges.get(digest) is not None:
            del self._merges[digest]
            self.popularity.learn(digest, None)
        self.popularity.forget(digest)
        return self.tier.unload(digest)

    def settle(self, done: Completion) -> BaseException | None:
        """Takes in what a job has done; why those who wait for merged weights must fail."""
        error = done.error
        if done.job is Job.MEASURE:
            if error is None:
                assert done.result is not None
                self._merges[done.digest] = done.result
                self.popularity.learn(done.digest, done.result)
                return self._too_large(done.digest)
            del self._merges[done.digest]
        self._observer.adapter_loaded(
            tier="merged", outcome="error" if error else "ok", seconds=done.seconds
        )
        if error is None:
            entry = self.tier.get(done.digest)
            assert entry is not None
            self._costs.note("merged", entry.nbytes, done.seconds)
            self.tier.loaded(done.digest)
            return None
        if done.job is Job.BUILD:
            self.tier.failed(done.digest)
        self.popularity.forget(done.digest)
        return error

    @property
    def measuring(self) -> int:
        """Adapters of which it is being asked what merging makes of them."""
        return sum(merge is None for merge in self._merges.values())

    def check_integrity(self, leases: Iterable[tuple[str, Sequence]]) -> None:
        """Asserts that the tier balances."""
        self.tier.check_integrity(leases)

    def _build(self, digest: str, size: int, *, keep: frozenset[str]) -> bool:
        if self.tier.reserve(digest, size, keep=keep) is None:
            return False

        def build() -> None:
            built = self._runner.build_merged(digest)
            assert built <= size, f"merged weights take {built} bytes, not {size}"

        self._loader.submit(Job.BUILD, digest, build)
        return True

    def _merge(self, digest: str) -> FoldedShare | None:
        """What merging makes of the adapter; None while the loader finds out."""
        if digest not in self._merges:
            self._merges[digest] = None
            self._loader.submit(Job.MEASURE, digest, partial(self._runner.measure_merge, digest))
        return self._merges[digest]

    def _too_large(self, digest: str) -> RequestInvalid | None:
        merge = self._merges.get(digest)
        if merge is None or self.tier.space.could_hold(merge.nbytes):
            return None
        budget = self.tier.space.capacity
        return RequestInvalid(
            "mode", f"merged weights take {merge.nbytes} bytes of a budget of {budget}"
        )
