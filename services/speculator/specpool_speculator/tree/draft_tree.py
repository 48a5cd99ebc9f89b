"""The draft tree of one sequence: everything drafted for it, each token computed at most once.

The root is the last committed token. A node is one token; the path to it from the root, after the committed tokens,
is its context. The *in-flight path* v0 .. vd starts at the root; v1 .. vd are the draft tokens that the target
verifies in the running round. A guess (k, t) of that round's outcome is the child t of v_k, and what is drafted for
it is the chain of rank-0 children below. So an outcome only moves the root: what was computed below the new root stays
(deeper tokens, ranks, branches that came late), and everything else is freed.

A node is *computed* once the model has run its token: then its ranks are known and `kv` holds its keys and values.
The parent of a computed node is computed, or it is the root, whose context `base` holds.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from specpool_engine.modeling.paged_kv import BlockPool, SequenceKV
from specpool_speculator.dense.dense_rows import DenseRow
from specpool_speculator.tree.node import Node, NodeRanks, TokenDistribution


@dataclass(slots=True)
class Work:
    """A run of tokens for the model: context still missing, then uncomputed nodes."""

    tree: DraftTree
    """The tree that the tokens belong to."""
    kv: SequenceKV
    """Block table that the tokens' keys and values are written to."""
    tokens: list[int]
    """Tokens to run, in order."""
    nodes: list[Node]
    """The last of these tokens, as nodes: each needs logits."""
    is_fork: bool
    """Whether `kv` was forked for this and is to be freed if the forward does not happen."""
    is_on_path: bool
    """Whether the nodes are of the in-flight path, so that other outcomes can be guessed once they are computed."""

    def finish(self, ranks: Sequence[NodeRanks]) -> None:
        """Take in the ranks of a forward that was done: the nodes are computed."""
        for node, node_ranks in zip(self.nodes, ranks, strict=True):
            node.kv, node.ranks = self.kv, node_ranks
            if isinstance(node_ranks.distribution, DenseRow):
                self.tree.rows.append(node_ranks.distribution)
        if self.is_on_path:
            self.tree.version += 1
        if self.tree.root.is_computed:
            self.tree.base = None

    def cancel(self) -> None:
        """Undo the preparations of a forward that was not done."""
        if self.is_fork:
            self.kv.free()


class DraftTree:
    """Committed tokens, the tree below them, and the blocks that hold it."""

    def __init__(self, pool: BlockPool, tokens: Sequence[int], *, round_: int = 0, salt: str = "") -> None:
        self.tokens = list(tokens)
        """Committed tokens; the last one is the root."""
        self.round = round_
        """Number of the running round."""
        self.base: SequenceKV | None = SequenceKV.from_prefix(pool, tokens, salt)
        """Context of an uncomputed root, perhaps not complete; None once the root is computed."""
        self.num_cached = self.base.length
        """Number of committed tokens that the prefix cache had at the start."""
        self.root = Node(self.tokens[-1], len(self.tokens) - 1)
        self.path: list[Node] = [self.root]
        """Nodes v0 .. vd of the in-flight path, the root first."""
        self.version = 0
        """Goes up with whatever changes what can be guessed; branches that merely grow do not."""
        self.rows: list[DenseRow] = []
        """Dense distributions that the nodes hold."""
        self._pool = pool
        self._salt = salt

    @property
    def draft_tokens(self) -> list[int]:
        """Draft tokens that the target verifies in the running round."""
        return [node.token for node in self.path[1:]]

    @property
    def num_blocks(self) -> int:
        """Number of block table entries held, shared ones counted for every branch."""
        return sum(len(kv.block_ids) for kv in self._all_kv())

    def context_blocks(self) -> set[int]:
        """Blocks that hold committed tokens or the in-flight path: what is kept when branches are given up."""
        held = [node.kv for node in self.path if node.kv is not None] + ([] if self.base is None else [self.base])
        return {block for kv in held for block in kv.block_ids}

    def set_path(self, draft_tokens: Iterable[int]) -> None:
        """Set the draft tokens that the target verifies in the running round; unknown ones become uncomputed nodes."""
        self.version += 1
        self.path = [self.root]
        for token in draft_tokens:
            self.path.append(self.path[-1].child(token))

    def commit(self, num_accepted: int, bonus_token: int) -> None:
        """Apply the running round's outcome: move the root, keep what is below it, free the rest."""
        self.version += 1
        old_root, old_base, last = self.root, self.base, self.path[num_accepted]
        root = last.child(bonus_token)
        self.tokens += [*(node.token for node in self.path[1 : num_accepted + 1]), bonus_token]
        base, base_length = (None, 0) if root.is_computed else self._context(num_accepted)
        root.parent = None
        del last.children[bonus_token]
        self.root, self.base, self.path = root, base, [root]
        self.round += 1
        self._release(list(old_root.subtree()), old_base, base_length)

    def missing(self) -> int:
        """Number of tokens of the in-flight path and its context that are still to be computed."""
        context = 0 if self.base is None else len(self.tokens) - 1 - self.base.length
        return context + sum(not node.is_computed for node in self.path)

    def work_on_path(self, taken: set[int], limit: int, *, root_only: bool = False) -> Work | None:
        """The next run of at most `limit` tokens towards computing the in-flight path, or the root alone."""
        path = self.path[:1] if root_only else self.path
        nodes = [node for node in path if not node.is_computed]
        if not nodes or limit < 1:
            return None
        context: list[int] = []
        if self.base is not None:
            kv, is_fork = self.base, False
            context = self.tokens[self.base.length : -1][:limit]
        else:
            kv, is_fork = self._extend(nodes[0], taken)
        nodes = nodes[: limit - len(context)] if kv.length + len(context) == nodes[0].position else []
        taken.add(id(kv))
        return Work(self, kv, [*context, *(node.token for node in nodes)], nodes, is_fork, is_on_path=True)

    def work_on(self, node: Node, taken: set[int]) -> Work:
        """The run of one uncomputed node whose parent is computed."""
        kv, is_fork = self._extend(node, taken)
        taken.add(id(kv))
        return Work(self, kv, [node.token], [node], is_fork, is_on_path=False)

    def distributions(self) -> list[TokenDistribution | DenseRow] | None:
        """What each draft token in flight was sampled from; None unless all of them were drafted here."""
        found: list[TokenDistribution | DenseRow] = []
        for node, following in zip(self.path, self.path[1:], strict=False):
            ranks = node.ranks
            if ranks is None or ranks.drafted[0] != following.token or ranks.distribution is None:
                return None
            found.append(ranks.distribution)
        return found

    def publish(self) -> None:
        """Make the committed context findable for later sequences with the same salt."""
        kv = self.root.kv or self.base
        if kv is not None:
            kv.publish_prefix(self.tokens, self._salt)

    def prune(self) -> None:
        """Give up every branch; only the in-flight path stays."""
        self.version += 1
        base_length = 0 if self.base is None else self.base.length
        dropped: list[Node] = []
        for node, following in zip(self.path, [*self.path[1:], None], strict=True):
            for child in node.children.values():
                if child is not following:
                    dropped += child.subtree()
            node.children = {} if following is None else {following.token: following}
        self._release(dropped, self.base, base_length)

    def evict(self) -> None:
        """Give every block back. The tokens stay, so that the sequence can be computed again later."""
        draft_tokens = self.draft_tokens
        self.free()
        self.root = Node(self.tokens[-1], len(self.tokens) - 1)
        self.base = SequenceKV(self._pool)
        self.set_path(draft_tokens)

    def free(self) -> None:
        """Give every block back; the tree is not used afterwards."""
        self.version += 1
        for kv in self._all_kv():
            kv.free()
        _unlink(list(self.root.subtree()))
        self.base = None
        self._release_rows(())

    def _extend(self, node: Node, taken: set[int]) -> tuple[SequenceKV, bool]:
        parent = node.parent
        assert parent is not None, "the root is run with its context"
        assert parent.kv is not None, "only children of computed nodes can be run"
        is_tip = parent.kv.length == node.position
        if is_tip and id(parent.kv) not in taken:
            return parent.kv, False
        return parent.kv.fork(node.position), True

    def _context(self, num_accepted: int) -> tuple[SequenceKV | None, int]:
        """The deepest computed context of v_k, k = `num_accepted`, and its length in tokens."""
        for node in reversed(self.path[: num_accepted + 1]):
            if node.kv is not None:
                return node.kv, node.position + 1
        return self.base, 0 if self.base is None else self.base.length

    def _all_kv(self) -> list[SequenceKV]:
        found = {id(node.kv): node.kv for node in self.root.subtree() if node.kv is not None}
        if self.base is not None:
            found[id(self.base)] = self.base
        return list(found.values())

    def _release(self, dropped: Sequence[Node], old_base: SequenceKV | None, base_length: int) -> None:
        """Free what was held for the `dropped` nodes alone, and cut off what is beyond the last node that is kept."""
        kept = list(self.root.subtree())
        needed: dict[int, int] = {}
        held: dict[int, SequenceKV] = {}
        for node in kept:
            kv = node.kv
            if kv is not None:
                key = id(kv)
                held[key] = kv
                if node.position >= needed.get(key, 0):
                    needed[key] = node.position + 1
        for node in dropped:
            if node.kv is not None:
                held[id(node.kv)] = node.kv
        if old_base is not None:
            held[id(old_base)] = old_base
        if self.base is not None:
            needed[id(self.base)] = base_length
        for key, kv in held.items():
            length = needed.get(key)
            if length is None:
                kv.free()
            elif kv.length > length:
                kv.truncate(length)
        _unlink(dropped)
        if self.rows:
            self._release_rows(kept)

    def _release_rows(self, kept: Iterable[Node]) -> None:
        needed = {id(node.ranks.distribution) for node in kept if node.ranks is not None}
        for row in self.rows:
            if id(row) not in needed:
                row.release()
        self.rows = [row for row in self.rows if row.probabilities is not None]


def _unlink(nodes: Iterable[Node]) -> None:
    """Let nodes that are in no tree any more be freed at once: parent and child would keep one another until the next
    garbage collection, which looks through all trees."""
    for node in nodes:
        node.parent = None
