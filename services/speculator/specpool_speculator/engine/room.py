"""Whether one more sequence fits into the KV cache, without taking anything that a sequence held needs."""

from __future__ import annotations

from collections.abc import Sequence

from specpool_engine.modeling.paged_kv import BlockPool
from specpool_speculator.tree.draft_tree import DraftTree


def blocks_for(num_tokens: int, pool: BlockPool) -> int:
    """Most blocks that writing `num_tokens` tokens anywhere can take."""
    return num_tokens // pool.block_size + 2


def has_room(pool: BlockPool, tree: DraftTree, held: Sequence[DraftTree]) -> bool:
    """Whether the context of `tree` fits beside those of all trees held. Their branches can be drafted again."""
    wanted = blocks_for(tree.missing(), pool)
    wanted += sum(blocks_for(other.missing(), pool) for other in held if not other.root.is_computed)
    if wanted <= pool.num_free:
        return True
    needed = set(tree.context_blocks()).union(*(other.context_blocks() for other in held))
    return wanted <= pool.num_blocks - len(needed)
