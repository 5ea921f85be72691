"""Any events, in any order, leave blocks, leases and bytes in balance."""

from __future__ import annotations

import math
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from adaplex.engine.errors import (
    AdapterLoadFailed,
    EngineFailed,
    NoRoomBesidePins,
    PinsFull,
    RequestInvalid,
)
from adaplex.engine.request import AdapterMode, Request
from engine.fakes import (
    UNIT,
    Ledger,
    ManualExecutor,
    digest,
    make_adapter,
    make_engine,
    make_request,
)
from fake_runner import expected

pytestmark = pytest.mark.slow

SIZES = {
    "a": UNIT,
    "b": UNIT,
    "c": 2 * UNIT,
    "d": 3 * UNIT,
    "e": 100,
    "l": UNIT,
    "v": 80,
    "i": 70,
    "m": 60,
}
FACTS: dict[str, dict[str, Any]] = {
    "l": {"leading": 7},
    "v": {"leading": 12},
    "i": {"invocation": (3, 4)},
    "m": {"merged_only": True},
}
"""Facts of some of the adapters."""


class EngineMachine(RuleBasedStateMachine):
    host_bytes = 0
    max_stretch = math.inf
    max_running = 5

    def __init__(self) -> None:
        super().__init__()
        self.executor = ManualExecutor()
        self.engine, self.runner = make_engine(
            self.executor,
            num_blocks=17,
            max_running=self.max_running,
            max_bypass=2,
            merged_bytes=250,
            merge_after=5,
            host_bytes=self.host_bytes,
            prefetch_ahead=3,
            max_pinned_share=0.7,
            max_stretch=self.max_stretch,
        )
        self.ledger = Ledger(self.engine)
        self.requests: dict[str, Request] = {}
        self.aborted: set[str] = set()
        self.kept: frozenset[str] = frozenset()
        """Digests that were pinned and in the arena."""

    @rule(
        length=st.integers(1, 40),
        first=st.integers(0, 2),
        adapter=st.sampled_from([None, *SIZES]),
        mode=st.sampled_from(AdapterMode),
        salt=st.sampled_from(["", "t"]),
        priority=st.integers(-1, 1),
        max_tokens=st.integers(1, 24),
    )
    def add(
        self,
        length: int,
        first: int,
        adapter: str | None,
        mode: AdapterMode,
        salt: str,
        priority: int,
        max_tokens: int,
    ) -> None:
        request = make_request(
            f"r{len(self.requests)}",
            range(first, first + length),
            make_adapter(adapter, SIZES[adapter], mode, **FACTS.get(adapter, {}))
            if adapter
            else None,
            max_tokens,
            cache_salt=salt,
            priority=priority,
        )
        try:
            self.engine.add(request)
        except RequestInvalid as refusal:
            assert request.adapter is not None
            if refusal.field == "mode":
                assert request.adapter.traits.merged_only
                assert mode is not AdapterMode.MERGED
            else:
                assert request.adapter.traits.invocation
                assert not {3, 4} <= set(request.prompt)
            return
        except NoRoomBesidePins:
            assert request.adapter is not None
            assert self.engine.stats().pinned
            assert request.adapter.digest not in self.engine.stats().resident
            return
        self.requests[request.request_id] = request

    @rule(count=st.integers(1, 6))
    def step(self, count: int) -> None:
        for _ in range(count):
            self.ledger.step()

    @precondition(lambda self: self.requests)
    @rule(data=st.data())
    def abort(self, data: st.DataObject) -> None:
        request_id = data.draw(st.sampled_from(sorted(self.requests)))
        self.aborted.add(request_id)
        self.engine.abort(request_id)

    @rule(name=st.sampled_from(sorted(SIZES)))
    def unload(self, name: str) -> None:
        self.kept -= {digest(name)}
        self.engine.unload(digest(name))
        assert digest(name) not in self.engine.stats().pinned

    @rule(name=st.sampled_from(sorted(SIZES)))
    def pin(self, name: str) -> None:
        try:
            self.engine.pin(digest(name), SIZES[name], name)
        except PinsFull:
            stats = self.engine.stats()
            too_many = stats.pinned_bytes_used + SIZES[name] > stats.pinned_bytes_total - UNIT
            unmerged = self.engine._residency._unmerged
            assert too_many or not unmerged.fits_beside_pins(digest(name), SIZES[name])
        else:
            assert digest(name) in self.engine.stats().pinned

    @rule(name=st.sampled_from(sorted(SIZES)))
    def unpin(self, name: str) -> None:
        self.kept -= {digest(name)}
        self.engine.unpin(digest(name))

    @precondition(lambda self: self.executor.jobs)
    @rule(data=st.data(), fails=st.booleans())
    def complete_a_load(self, data: st.DataObject, fails: bool) -> None:
        if fails:
            self.runner.failing = {digest(name): OSError(name) for name in SIZES}
        self.executor.run(data.draw(st.integers(0, len(self.executor.jobs) - 1)))
        self.runner.failing = {}

    @rule()
    def fail_a_step(self) -> None:
        self.runner.failure = RuntimeError("device")
        self.ledger.step()
        self.runner.failure = None

    @invariant()
    def everything_balances(self) -> None:
        self.engine.check_integrity()
        stats = self.engine.stats()
        assert self.runner.extents.keys() >= stats.resident
        assert self.runner.host >= stats.host
        assert self.runner.merged >= stats.merged
        assert stats.host_bytes_used <= self.host_bytes
        assert self.kept <= stats.resident, "a pinned adapter has left"
        self.kept = stats.pinned & stats.resident

    def teardown(self) -> None:
        self.ledger.drain_with(self.executor)
        for pinned in self.engine.stats().pinned - self.engine.stats().resident:
            size = SIZES[pinned.removeprefix("sha256:")]
            unmerged = self.engine._residency._unmerged
            assert not unmerged.fits_beside_pins(pinned, size), "a pin was forgotten"
        assert self.runner.extents.keys() == self.engine.stats().resident
        assert self.runner.host == self.engine.stats().host
        assert self.runner.merged == self.engine.stats().merged
        for request_id, request in self.requests.items():
            self.check_answer(request_id, request)

    def check_answer(self, request_id: str, request: Request) -> None:
        outputs = self.ledger.outputs.get(request_id, [])
        tokens = self.ledger.tokens(request_id) if outputs else []
        assert tokens == expected(request)[: len(tokens)]
        if outputs and outputs[-1].error is not None:
            assert isinstance(
                outputs[-1].error,
                AdapterLoadFailed | EngineFailed | NoRoomBesidePins | RequestInvalid,
            )
        elif request_id not in self.aborted:
            assert outputs[-1].finish is not None
            room = 64 - len(request.prompt) - request.leading
            full = min(request.sampling.max_tokens, room)
            assert len(tokens) == full


class HostedEngineMachine(EngineMachine):
    """With host memory for some of the adapters, and so few running sequences that most adapters
    are prefetched.
    """

    host_bytes = 5 * UNIT
    max_running = 2


class PacedEngineMachine(EngineMachine):
    """With prompts limited by the seconds that they add to decoding steps."""

    max_stretch = 1.5


for machine in (EngineMachine, HostedEngineMachine, PacedEngineMachine):
    machine.TestCase.settings = settings(
        max_examples=60, stateful_step_count=40, deadline=None, database=None
    )
TestEngineMachine = EngineMachine.TestCase
TestHostedEngineMachine = HostedEngineMachine.TestCase
TestPacedEngineMachine = PacedEngineMachine.TestCase
