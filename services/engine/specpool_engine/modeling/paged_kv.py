"""Block tables of a paged KV cache: who owns which block, and nothing about tensors.

A *block* holds the keys and values of `block_size` consecutive tokens of one sequence, for every layer. Blocks are
reference-counted so that branches of a sequence, and sequences with one prompt prefix, can share them. The contents
are the model's business: a copy that sharing makes necessary is queued here and executed by the model in one batched
operation before it writes anything.

A block is in exactly one of three states:
    free      not referenced, contents meaningless
    cached    not referenced, but its contents are findable in the prefix index; evicted in LRU order when needed
    used      referenced by one or more block tables (and perhaps findable as well)
"""

from __future__ import annotations

import hashlib
from array import array
from collections import Counter, OrderedDict
from collections.abc import Iterable, Sequence

from specpool.errors import KVCacheFull

BlockHash = bytes


def num_blocks_for(num_tokens: int, block_size: int) -> int:
    """The number of blocks that `num_tokens` tokens take."""
    return -(-num_tokens // block_size)


def hash_block(parent: BlockHash, tokens: Sequence[int]) -> BlockHash:
    """The name of a full block: depends on its tokens and, through `parent`, on all tokens before it and the salt."""
    return hashlib.blake2b(array("q", tokens).tobytes(), key=parent, digest_size=16).digest()


def hash_salt(salt: str) -> BlockHash:
    """The parent of a first block: two tenants with different salts never find each other's blocks."""
    return hashlib.blake2b(salt.encode(), digest_size=16).digest()


class BlockPool:
    """Reference-counted block ids `0 .. num_blocks - 1` with a prefix index. One engine thread owns it."""

    def __init__(self, num_blocks: int, block_size: int) -> None:
        if num_blocks < 1 or block_size < 1:
            raise ValueError(f"num_blocks and block_size must be at least 1, got {num_blocks} and {block_size}")
        self.num_blocks = num_blocks
        self.block_size = block_size
        self._free = list(range(num_blocks - 1, -1, -1))
        self._references = [0] * num_blocks
        self._cached: OrderedDict[int, None] = OrderedDict()
        self._block_of_hash: dict[BlockHash, int] = {}
        self._hash_of_block: dict[int, BlockHash] = {}
        self._pending_copies: dict[int, int] = {}

    @property
    def num_free(self) -> int:
        """Number of blocks that can be allocated now, evicting cached ones."""
        return len(self._free) + len(self._cached)

    @property
    def num_used(self) -> int:
        """Number of blocks referenced by some block table."""
        return self.num_blocks - self.num_free

    def references(self, block: int) -> int:
        """Number of block tables that hold `block`."""
        return self._references[block]

    def check_room(self, num_wanted: int) -> None:
        """Raise `KVCacheFull` unless `num_wanted` blocks can be allocated."""
        if num_wanted > self.num_free:
            raise KVCacheFull(
                f"KV cache is full: {num_wanted} more blocks of {self.block_size} tokens wanted, "
                f"{self.num_free} of {self.num_blocks} available",
                metadata={
                    "wanted_blocks": num_wanted,
                    "available_blocks": self.num_free,
                    "total_blocks": self.num_blocks,
                },
            )

    def allocate(self, count: int) -> list[int]:
        """Take `count` blocks, each referenced once; all or none."""
        self.check_room(count)
        blocks = [self._free.pop() if self._free else self._evict() for _ in range(count)]
        for block in blocks:
            self._references[block] = 1
        return blocks

    def share(self, block: int) -> None:
        """Add a reference to a block that is used or cached."""
        if self._references[block] == 0:
            del self._cached[block]
        self._references[block] += 1

    def release(self, block: int) -> None:
        """Drop one reference; the last one makes the block cached if it is findable, else free."""
        assert self._references[block] > 0, f"block {block} released more often than taken"
        self._references[block] -= 1
        if self._references[block]:
            return
        self._pending_copies.pop(block, None)
        if block in self._hash_of_block:
            self._cached[block] = None
        else:
            self._free.append(block)

    def publish(self, block: int, name: BlockHash) -> None:
        """Make a full, written block findable; the first block of a name wins."""
        if name not in self._block_of_hash and block not in self._hash_of_block:
            self._block_of_hash[name] = block
            self._hash_of_block[block] = name

    def find(self, name: BlockHash) -> int | None:
        """The block of that name, used or cached; None if there is none."""
        return self._block_of_hash.get(name)

    def is_writable(self, block: int) -> bool:
        """Whether a used block has one holder, and nobody finds it by its contents."""
        return self._references[block] == 1 and block not in self._hash_of_block

    def make_writable(self, block: int) -> int:
        """A block with the same contents that only the caller holds: itself, or a fresh copy of a shared one."""
        if self._references[block] == 1:
            self._forget(block)
            return block
        (copy,) = self.allocate(1)
        # A source that itself awaits a copy has stale contents: read from where its contents will come from.
        self._pending_copies[copy] = self._pending_copies.get(block, block)
        self.release(block)
        return copy

    def take_copies(self) -> tuple[list[int], list[int]]:
        """Queued copies as (sources, destinations), to be read all before any is written; empties the queue."""
        destinations, sources = list(self._pending_copies), list(self._pending_copies.values())
        self._pending_copies.clear()
        return sources, destinations

    def _evict(self) -> int:
        block, _ = self._cached.popitem(last=False)
        self._forget(block)
        return block

    def _forget(self, block: int) -> None:
        name = self._hash_of_block.pop(block, None)
        if name is not None:
            del self._block_of_hash[name]


class SequenceKV:
    """Block table of one sequence or branch. `length` counts the tokens whose keys and values are written."""

    def __init__(self, pool: BlockPool) -> None:
        self.pool = pool
        self.block_ids: list[int] = []
        self.length = 0
        self._hashes: list[BlockHash] = []
        self._salt: str | None = None

    @classmethod
    def from_prefix(cls, pool: BlockPool, tokens: Sequence[int], salt: str = "") -> SequenceKV:
        """Start with the longest cached prefix in full blocks, leaving at least one token to be computed."""
        kv = cls(pool)
        kv._salt = salt
        parent = hash_salt(salt)
        for start in range(0, (len(tokens) - 1) // pool.block_size * pool.block_size, pool.block_size):
            parent = hash_block(parent, tokens[start : start + pool.block_size])
            block = pool.find(parent)
            if block is None:
                break
            pool.share(block)
            kv.block_ids.append(block)
            kv._hashes.append(parent)
        kv.length = len(kv.block_ids) * pool.block_size
        return kv

    def publish_prefix(self, tokens: Sequence[int], salt: str = "") -> None:
        """Make the full blocks findable. `tokens` start at the sequence's start; unwritten ones are ignored."""
        if salt != self._salt:
            self._salt, self._hashes = salt, []
        size = self.pool.block_size
        for index in range(len(self._hashes), min(len(tokens), self.length) // size):
            parent = self._hashes[-1] if self._hashes else hash_salt(salt)
            self._hashes.append(hash_block(parent, tokens[index * size : (index + 1) * size]))
            self.pool.publish(self.block_ids[index], self._hashes[-1])

    def has_room(self, num_tokens: int) -> bool:
        """Whether `num_tokens` tokens can be written as it is: `reserve` would change nothing."""
        size, blocks = self.pool.block_size, self.block_ids
        index = self.length // size
        if index >= len(blocks) or self.length + num_tokens > len(blocks) * size:
            return num_tokens == 0
        return self.pool.is_writable(blocks[index])

    def blocks_to_reserve(self, num_tokens: int) -> int:
        """Number of blocks that `reserve(num_tokens)` would allocate now."""
        end = num_blocks_for(self.length + num_tokens, self.pool.block_size)
        return max(0, end - len(self.block_ids)) + (self.shared_write_block(num_tokens) is not None)

    def shared_write_block(self, num_tokens: int) -> int | None:
        """The shared, partly filled block that writing `num_tokens` tokens would have to copy, if there is one."""
        index = self.length // self.pool.block_size
        if num_tokens == 0 or index >= len(self.block_ids):
            return None
        block = self.block_ids[index]
        return block if self.pool.references(block) > 1 else None

    def reserve(self, num_tokens: int) -> None:
        """Make room for `num_tokens` tokens after `length`; raises `KVCacheFull` with everything unchanged."""
        self.pool.check_room(self.blocks_to_reserve(num_tokens))
        size = self.pool.block_size
        end = num_blocks_for(self.length + num_tokens, size)
        first_written = self.length // size
        if num_tokens and first_written < len(self.block_ids):
            # Blocks after this one were reserved earlier for this table alone, so only the first can be shared.
            self.block_ids[first_written] = self.pool.make_writable(self.block_ids[first_written])
        self.block_ids += self.pool.allocate(max(0, end - len(self.block_ids)))

    def advance(self, num_tokens: int) -> None:
        """Count `num_tokens` more tokens as written, after a forward wrote them."""
        assert self.length + num_tokens <= len(self.block_ids) * self.pool.block_size, "beyond the reserved room"
        self.length += num_tokens

    def truncate(self, length: int) -> None:
        """Keep the first `length` tokens and give back whole blocks after them, reserved ones included."""
        if not 0 <= length <= self.length:
            raise ValueError(f"cannot truncate a sequence of {self.length} tokens to {length}")
        self.length = length
        keep = num_blocks_for(length, self.pool.block_size)
        self._release_from(keep)
        del self._hashes[length // self.pool.block_size :]

    def fork(self, length: int | None = None) -> SequenceKV:
        """A branch sharing the first `length` tokens (default: all); whoever writes a shared block copies it."""
        length = self.length if length is None else length
        if not 0 <= length <= self.length:
            raise ValueError(f"cannot fork a sequence of {self.length} tokens at {length}")
        branch = SequenceKV(self.pool)
        branch.block_ids = self.block_ids[: num_blocks_for(length, self.pool.block_size)]
        for block in branch.block_ids:
            self.pool.share(block)
        branch.length = length
        branch._salt = self._salt
        branch._hashes = self._hashes[: length // self.pool.block_size]
        return branch

    def free(self) -> None:
        """Give every block back. The table is empty afterwards and may be freed again or reused."""
        self.length = 0
        self._hashes.clear()
        self._release_from(0)

    def _release_from(self, index: int) -> None:
        # Tail first, so that the LRU order evicts the end of a cached prefix before its beginning.
        while len(self.block_ids) > index:
            self.pool.release(self.block_ids.pop())


def reserve_all(pool: BlockPool, wanted: Iterable[tuple[SequenceKV, int]]) -> None:
    """Reserve room in several tables, all or none: on `KVCacheFull` no table has changed."""
    # Most tokens of a step are one row each, in the middle of a block that is theirs alone.
    wanted = [(kv, num_tokens) for kv, num_tokens in wanted if not kv.has_room(num_tokens)]
    if not wanted:
        return
    num_blocks = sum(kv.blocks_to_reserve(num_tokens) for kv, num_tokens in wanted)
    writers = Counter(kv.shared_write_block(num_tokens) for kv, num_tokens in wanted)
    for block, num_writers in writers.items():
        # When all holders of a block write, the last of them finds it unshared and needs no copy.
        if block is not None and num_writers == pool.references(block):
            num_blocks -= 1
    pool.check_room(num_blocks)
    for kv, num_tokens in wanted:
        kv.reserve(num_tokens)
