"""BlockManager: allocates blocks of the KV cache to sequences, and shares equal prefixes."""

from __future__ import annotations

import hashlib
import struct
from collections import Counter
from collections.abc import Iterable

from adaplex.engine.config import EngineConfig
from adaplex.engine.sequence import Sequence


def digest_fields(*fields: tuple[bytes, bytes]) -> bytes:
    """Returns the SHA-256 over (tag, value) pairs, each part prefixed by its length: no two lists
    collide by moving bytes from one field to the next.
    """
    digest = hashlib.sha256()
    for part in (part for pair in fields for part in pair):
        digest.update(struct.pack("<Q", len(part)))
        digest.update(part)
    return digest.digest()


class BlockManager:
    """Reference-counted blocks of `block_tokens` tokens. Block 0 is never allocated.

    A block is free, in use (by one or more sequences) or cached: used by none, its content known
    by a published hash. Cached blocks are reused, least recently used first, when no block is free.
    Shared blocks are full, so no sequence writes to them.
    """

    def __init__(self, config: EngineConfig, base_digest: str) -> None:
        self._block_tokens = config.block_tokens
        self._prefix_cache = config.prefix_cache
        self._base = base_digest.encode()
        self._total = config.usable_blocks
        self._free = list(range(config.num_blocks - 1, 0, -1))
        self._cached: dict[int, None] = {}
        """Cached blocks, least recently used first."""
        self._references: dict[int, int] = {}
        """Number of sequences that use each block in use."""
        self._published: dict[bytes, int] = {}
        """Blocks by hash."""
        self._hash_of: dict[int, bytes] = {}

    @property
    def available(self) -> int:
        """Number of blocks that can be allocated now."""
        return len(self._free) + len(self._cached)

    @property
    def in_use(self) -> int:
        """Number of blocks that sequences use."""
        return len(self._references)

    def allocate(self, sequence: Sequence, *, reserve: int = 0) -> bool:
        """Allocates the blocks that the known tokens of a sequence without blocks need, shared
        ones first.

        Sets `blocks`, `hashes` and `computed`, and leaves at least the last token to compute.
        Returns False and changes nothing if fewer than `reserve` blocks would remain available.
        """
        assert not sequence.blocks
        hashes = self._known_prefix(sequence)
        hits = [self._published[key] for key in hashes]
        fresh = self._blocks_for(sequence) - len(hits)
        revived = sum(block in self._cached for block in hits)
        if self.available - revived - fresh < reserve:
            return False
        for block in hits:
            self._cached.pop(block, None)
            self._references[block] = self._references.get(block, 0) + 1
        sequence.blocks = hits + [self._allocate_block() for _ in range(fresh)]
        sequence.hashes = hashes
        sequence.computed = len(hits) * self._block_tokens
        return True

    def extend(self, sequence: Sequence) -> bool:
        """Allocates blocks for every known token of a running sequence; returns False if blocks run
        out.
        """
        while len(sequence.blocks) < self._blocks_for(sequence):
            if not self.available:
                return False
            sequence.blocks.append(self._allocate_block())
        return True

    def publish(self, sequence: Sequence) -> None:
        """Publishes the full, computed blocks of a sequence, so that later sequences share them."""
        if not self._prefix_cache:
            return
        for index in range(len(sequence.hashes), sequence.computed // self._block_tokens):
            key = self._hash(sequence, index, self._parent(sequence, sequence.hashes))
            sequence.hashes.append(key)
            if key not in self._published:  # another sequence may have computed the same
                self._published[key] = sequence.blocks[index]
                self._hash_of[sequence.blocks[index]] = key

    def free(self, sequence: Sequence) -> None:
        """Frees all blocks of a sequence; published ones stay cached, and the end of the prefix is
        reused first.
        """
        for block in reversed(sequence.blocks):
            self._references[block] -= 1
            if self._references[block]:
                continue
            del self._references[block]
            if block in self._hash_of:
                self._cached[block] = None
            else:
                self._free.append(block)
        sequence.blocks = []
        sequence.hashes = []
        sequence.computed = 0

    def check_integrity(self, sequences: Iterable[Sequence]) -> None:
        """Asserts that every block is free, cached or in use, and that the reference counts equal
        the block tables of `sequences`, all running ones.
        """
        tables = Counter(block for sequence in sequences for block in sequence.blocks)
        assert tables == self._references
        everything = [*self._free, *self._cached, *self._references]
        assert sorted(everything) == list(range(1, self._total + 1))
        assert self._hash_of == {block: key for key, block in self._published.items()}
        assert self._cached.keys() <= self._hash_of.keys()
        assert not set(self._free) & self._hash_of.keys()

    def _blocks_for(self, sequence: Sequence) -> int:
        return -(-len(sequence) // self._block_tokens)

    def _allocate_block(self) -> int:
        if self._free:
            block = self._free.pop()
        else:
            block = next(iter(self._cached))
            del self._cached[block]
            del self._published[self._hash_of.pop(block)]
        self._references[block] = 1
        return block

    def _known_prefix(self, sequence: Sequence) -> list[bytes]:
        """Returns the hashes of the leading blocks that are published, without the last token's."""
        hashes: list[bytes] = []
        if not self._prefix_cache:
            return hashes
        for index in range((len(sequence) - 1) // self._block_tokens):
            key = self._hash(sequence, index, self._parent(sequence, hashes))
            if key not in self._published:
                break
            hashes.append(key)
        return hashes

    def _parent(self, sequence: Sequence, hashes: list[bytes]) -> bytes:
        """Returns the hash of the block before the next one, for the first block the root."""
        return hashes[-1] if hashes else self._root(sequence)

    def _root(self, sequence: Sequence) -> bytes:
        """Returns the hash that separates bases and tenants."""
        return digest_fields(
            (b"base", self._base),
            (b"salt", sequence.request.cache_salt.encode()),
        )

    def _hash(self, sequence: Sequence, index: int, parent: bytes) -> bytes:
        start, end = index * self._block_tokens, (index + 1) * self._block_tokens
        tokens = sequence.tokens[start:end]
        adapter = sequence.adapter_key if end > sequence.adapter_from else ""
        return digest_fields(
            (b"parent", parent),
            (b"adapter", adapter.encode()),
            (b"tokens", struct.pack(f"<{len(tokens)}Q", *tokens)),
        )
