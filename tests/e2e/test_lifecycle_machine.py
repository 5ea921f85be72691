"""Random uploads, alias changes, pins, deletes, requests and restarts, against a simple model.

Store, catalog and engine are real. The language model is a fake whose next token depends on the
adapter's digest, and which checks every read of the KV cache.
"""

from __future__ import annotations

import shutil
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
)

from adaplex.adapters.errors import AdapterInvalid, AdapterNotFound
from adaplex.adapters.registry.registry import AdapterRegistry
from adaplex.adapters.storage.alias_split import Target
from adaplex.adapters.storage.lease import Lease
from adaplex.engine.engine import Engine
from adaplex.engine.errors import NoRoomBesidePins, PinsFull
from adaplex.engine.request import AdapterRef, Request
from adapters.handmade import UPLOAD, files, make_registry, objects, push, staged, tensors
from engine.fakes import Ledger, make_engine, make_request
from fake_runner import FakeRunner, expected

pytestmark = pytest.mark.slow

NAMES = ["a", "b"]
ALIASES = ["default", "prod"]
CONTENTS = [files(weights=tensors(seed=seed)) for seed in range(4)]
PACKED = 512
"""Bytes of each content in the arena; two fit, and one can be pinned."""

Split = dict[int, float]


@dataclass
class Known:
    """The expected state of a name."""

    last: int = 0
    versions: dict[int, str] = field(default_factory=dict)
    aliases: dict[str, Split] = field(default_factory=dict)

    def reachable(self, alias: str) -> set[str]:
        """Returns the digests that a selector may resolve to; none if it must not be found."""
        if not self.versions:
            return set()
        split = self.aliases.get(alias or "default")
        if split is not None:
            return {self.versions[number] for number in split}
        return {self.versions[max(self.versions)]} if alias in ("", "latest") else set()


class LifecycleMachine(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.root = Path(tempfile.mkdtemp(prefix="lifecycle"))
        self.known = {name: Known() for name in NAMES}
        self.digests: dict[int, str] = {}
        self.leases: dict[str, Lease] = {}
        self.requests: dict[str, Request] = {}
        self.aborted: set[str] = set()
        self.count = 0
        self.open()

    def open(self) -> None:
        self.registry: AdapterRegistry = make_registry(self.root)
        self.engine: Engine
        self.runner: FakeRunner
        self.engine, self.runner = make_engine(
            arena_bytes=2 * PACKED, host_bytes=3 * PACKED, num_blocks=33, max_running=4
        )
        self.ledger = Ledger(self.engine)

    @initialize()
    def begin(self) -> None:
        """Uploads two versions, so that alias changes soon have a choice."""
        for seed in range(2):
            self.upload("a", seed)

    # Names.

    @rule(name=st.sampled_from(NAMES), seed=st.integers(0, 3))
    def upload(self, name: str, seed: int) -> None:
        done = push(self.registry, name, CONTENTS[seed], replace=True)
        digest = self.digests.setdefault(seed, done.record.digest)
        assert done.record.digest == digest
        known = self.known[name]
        same = bool(known.versions) and known.versions[max(known.versions)] == digest
        assert done.created == (not same)
        if not same:
            known.last += 1
            known.versions[known.last] = digest
        assert done.record.version == known.last or same

    @rule(name=st.sampled_from(NAMES), alias=st.sampled_from(ALIASES), data=st.data())
    def point(self, name: str, alias: str, data: st.DataObject) -> None:
        known = self.known[name]
        numbers = st.integers(1, max(2, known.last))
        split = data.draw(st.dictionaries(numbers, st.sampled_from([1.0, 9.0]), min_size=1))
        targets = [Target(number, weight) for number, weight in split.items()]
        try:
            self.registry.names.set_alias(name, alias, targets, UPLOAD)
        except AdapterNotFound:
            assert not split.keys() <= known.versions.keys()
            return
        known.aliases[alias] = split

    @rule(name=st.sampled_from(NAMES), alias=st.sampled_from(ALIASES))
    def unpoint(self, name: str, alias: str) -> None:
        try:
            self.registry.names.delete_alias(name, alias, UPLOAD)
        except AdapterNotFound:
            assert alias not in self.known[name].aliases
            return
        del self.known[name].aliases[alias]

    @rule(name=st.sampled_from(NAMES))
    def delete(self, name: str) -> None:
        known = self.known[name]
        try:
            deleted = self.registry.names.delete(name, UPLOAD)
        except AdapterNotFound:
            assert not known.versions
            return
        assert deleted.versions == len(known.versions)
        self.forget(deleted.digests)
        self.known[name] = Known(known.last)

    @rule(name=st.sampled_from(NAMES), data=st.data())
    def delete_version(self, name: str, data: st.DataObject) -> None:
        known = self.known[name]
        number = data.draw(st.integers(1, max(1, known.last)))
        try:
            deleted = self.registry.names.delete(f"{name}@{number}", UPLOAD)
        except AdapterNotFound:
            assert number not in known.versions
        except AdapterInvalid:
            assert any(number in split for split in known.aliases.values())
        else:
            self.forget(deleted.digests)
            del known.versions[number]

    def forget(self, digests: tuple[str, ...]) -> None:
        """Unloads deleted contents, as the service does."""
        for digest in digests:
            self.engine.unload(digest)

    @rule(name=st.sampled_from(NAMES))
    def pin(self, name: str) -> None:
        try:
            records = self.registry.names.reachable(name)
        except AdapterNotFound:
            return
        for record in records:
            try:
                self.engine.pin(record.digest, record.packed_bytes, name)
            except PinsFull:
                return

    @rule(seed=st.integers(0, 3))
    def unload(self, seed: int) -> None:
        if seed in self.digests:
            self.engine.unload(self.digests[seed])

    # Requests.

    @rule(
        name=st.sampled_from(NAMES),
        alias=st.sampled_from(["", "latest", *ALIASES]),
        length=st.integers(1, 20),
        max_tokens=st.integers(1, 8),
    )
    def generate(self, name: str, alias: str, length: int, max_tokens: int) -> None:
        possible = self.known[name].reachable(alias)
        try:
            lease = self.registry.resolve(f"{name}@{alias}" if alias else name)
        except AdapterNotFound:
            assert not possible
            return
        assert lease.record.digest in possible
        self.count += 1
        adapter = AdapterRef.of(lease.record)
        request = make_request(f"r{self.count}", range(length), adapter, max_tokens)
        try:
            self.engine.add(request)
        except NoRoomBesidePins:
            lease.release()
            return
        self.leases[request.request_id], self.requests[request.request_id] = lease, request

    @rule(count=st.integers(1, 5))
    def step(self, count: int) -> None:
        for _ in range(count):
            for output in self.ledger.step():
                if output.last:
                    self.end(output.request_id)

    @precondition(lambda self: self.leases)
    @rule(data=st.data())
    def cancel(self, data: st.DataObject) -> None:
        request_id = data.draw(st.sampled_from(sorted(self.leases)))
        self.engine.abort(request_id)
        self.aborted.add(request_id)
        self.end(request_id)

    def end(self, request_id: str) -> None:
        self.forget(self.leases.pop(request_id).release())
        outputs = self.ledger.outputs.get(request_id, [])
        tokens = self.ledger.tokens(request_id) if outputs else []
        request = self.requests.pop(request_id)
        wanted = expected(request)
        assert tokens == wanted[: len(tokens)], "the answer of another digest"
        if request_id not in self.aborted:
            failed = isinstance(outputs[-1].error, NoRoomBesidePins)
            assert failed or tokens == wanted

    @rule()
    def restart(self) -> None:
        for request_id in tuple(self.leases):
            self.engine.abort(request_id)
            self.aborted.add(request_id)
            self.end(request_id)
        self.registry.close()
        self.open()

    @invariant()
    def nothing_is_lost(self) -> None:
        self.engine.check_integrity()
        self.registry.check_integrity()
        named = {d for known in self.known.values() for d in known.versions.values()}
        leased = {lease.record.digest for lease in self.leases.values()}
        assert objects(self.root) == named | leased
        assert self.registry.leased == len(leased)
        assert staged(self.root) == []
        assert self.engine.stats().resident <= self.runner.extents.keys()
        assert self.engine.stats().host <= self.runner.host
        for name, known in self.known.items():
            assert self.registry.names.exists(name) == bool(known.versions)

    def teardown(self) -> None:
        for _ in range(500):
            if not self.leases:
                break
            self.step(5)
        assert not self.leases, "a request never ends"
        self.nothing_is_lost()
        self.registry.close()
        shutil.rmtree(self.root)


LifecycleMachine.TestCase.settings = settings(
    max_examples=80, stateful_step_count=50, deadline=None, database=None
)
TestLifecycleMachine = LifecycleMachine.TestCase
