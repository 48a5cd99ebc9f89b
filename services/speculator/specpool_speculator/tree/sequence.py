"""One sequence of one target, as the speculator holds it."""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from specpool.algorithm.sampling import SamplingParams
from specpool.algorithm.verification import VerificationMode
from specpool_speculator.engine.estimates import GuessSpread
from specpool_speculator.tree.branch import Branch, Branches, extend_branches, find_branches
from specpool_speculator.tree.draft_tree import DraftTree
from specpool_speculator.tree.node import Node

SequenceKey = tuple[int, str]
"""A sequence's key (connection, sequence id): two targets may use the same id."""
Outcome = tuple[int, int]
"""A verification outcome (accepted length k, bonus token t*)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SequenceOptions:
    """What a target said of a sequence when it opened it."""

    tenant: str
    """Name of the tenant, for sharing rows."""
    weight: float
    """Weight of the tenant, for sharing rows."""
    sampling: SamplingParams
    """Sampling parameters of the request."""
    verification: VerificationMode
    """How the target verifies."""
    seed: int
    """Seed of the request's noise."""
    num_prompt_tokens: int
    """Number of tokens at the beginning that are the prompt."""
    lookahead: int
    """Lookahead K: most draft tokens of a round."""
    speculates_ahead: bool
    """Whether it is drafted for ahead (mode SSD); the synchronous baseline (SD) drafts only when asked."""
    sends_distributions: bool
    """Whether the target needs the distributions of draft tokens."""
    vocab_size: int
    """Number of tokens that the target knows; the draft's vocabulary may be larger."""
    stop_tokens: frozenset[int]
    """Tokens that end the output: nothing is drafted after them."""
    max_length: int
    """Longest length in tokens; what is beyond it is never needed or cannot be computed."""


@dataclass(slots=True)
class Request:
    """A pending `speculate_now` of a target that waits."""

    round: int
    """Round that is asked for, echoed in the answer."""
    num_tokens: int
    """Number of tokens; the target is answered as soon as that many are drafted."""
    deadline_s: float
    """Time (monotonic) at which the target is answered with what there is then."""


@dataclass(frozen=True, slots=True)
class Guess:
    """A guessed outcome of the running round."""

    outcome: Outcome
    """The outcome that is guessed."""
    node: Node
    """The bonus token's node; the drafted tokens are the chain below."""
    probability: float
    """Probability that this is the outcome; 0 for branches left over from earlier rounds, which are not extended."""


@dataclass(slots=True)
class SequenceState:
    """State of one sequence: tree, spread of the running round, and what the target was told."""

    key: SequenceKey
    """Connection and id of the sequence."""
    options: SequenceOptions
    """What the target said when it opened the sequence."""
    tree: DraftTree
    """Everything drafted for the sequence."""
    spread: GuessSpread
    """How the running round's outcome is guessed."""
    request: Request | None = None
    """What the target waits for."""
    outcome_s: float | None = None
    """Time (monotonic) at which the last outcome came."""
    awaits_start: bool = False
    """Whether the last outcome did not say what is verified next; `start_round` will."""
    is_dense: bool = False
    """Whether draft tokens are sampled from distributions over all tokens, which a process group can carry."""
    pushed: dict[Outcome, int] = field(default_factory=dict)
    """Entries of the running round's table that were pushed, with their number of tokens."""
    _branches: Branches | None = None

    def is_end(self, node: Node) -> bool:
        """Whether nothing is to be drafted after `node`."""
        stops = self.options.stop_tokens
        return node.position + 1 >= self.options.max_length or (node.token in stops and node.parent is not None)

    def branches(self) -> list[Branch]:
        """What is drafted for each guessed outcome of the running round, in the order of `guesses`."""
        return self._current_branches().all

    def take_grown(self) -> list[Branch]:
        """The branches that are new or longer since the last call."""
        branches = self._current_branches()
        grown, branches.grown = branches.grown, []
        return grown

    def extend(self, nodes: Iterable[Node]) -> None:
        """Note that `nodes`, tips of branches or not, were computed."""
        if self._branches is not None and not extend_branches(self._branches, self, nodes):
            self._branches = None

    def _current_branches(self) -> Branches:
        if self._branches is None or self._branches.version != self.tree.version:
            self._branches = find_branches(self)
        return self._branches

    def guesses(self) -> Iterator[Guess]:
        """Guessed outcomes of the running round, in order of accepted length, then rank."""
        path = self.tree.path
        chosen = self._best_first() if self._is_best_first else self._by_fan_out()
        for k, (node, ranked) in enumerate(zip(path, chosen, strict=False)):
            draft_token = path[k + 1].token if k + 1 < len(path) else None
            for token, probability in ranked:
                yield Guess((k, token), node.child(token), probability)
            expected = {token for token, _ in ranked}
            for token, child in list(node.children.items()):
                if child.is_computed and token != draft_token and token not in expected:
                    yield Guess((k, token), child, 0.0)

    @property
    def _is_best_first(self) -> bool:
        return self.spread.budget > 0 and self.options.verification is not VerificationMode.REJECTION

    def _open_path(self) -> Iterator[tuple[Node, int | None]]:
        """Nodes after which the outcome may be guessed now, each with the token that is verified there."""
        path = self.tree.path
        for k, node in enumerate(path):
            if not node.is_computed or (k and self.is_end(node)):
                return
            yield node, path[k + 1].token if k + 1 < len(path) else None

    def _by_fan_out(self) -> list[list[tuple[int, float]]]:
        """Tokens guessed after each accepted length, and their probabilities, as the spread has it."""
        return [
            list(zip(node.guesses(draft_token), probabilities, strict=False))
            for (node, draft_token), probabilities in zip(self._open_path(), self.spread.probabilities, strict=False)
        ]

    def _best_first(self) -> list[list[tuple[int, float]]]:
        """Tokens guessed after each accepted length, and their probabilities: the most likely of all lengths."""
        reached, guesses = 1.0, []
        for node, draft_token in self._open_path():
            assert node.ranks is not None, "computed"
            ranked = zip(node.ranks.drafted, node.ranks.probabilities, strict=True)
            guesses.append([(token, reached * p) for token, p in ranked if token != draft_token])
            if draft_token is not None:
                reached *= node.ranks.probability(draft_token)
        by_value = ((p, -k, token) for k, ranked in enumerate(guesses) for token, p in ranked)
        chosen = {(-k, token) for _, k, token in heapq.nlargest(self.spread.budget, by_value)}
        return [[(t, p) for t, p in ranked if (k, t) in chosen] for k, ranked in enumerate(guesses)]

    def chain_probability(self, node: Node, num_tokens: int) -> float:
        """Probability that the first `num_tokens` tokens drafted after `node` are accepted, given that `node` was."""
        probability = 1.0
        for _ in range(num_tokens):
            assert node.ranks is not None, "it has drafted tokens"
            probability *= self.acceptance_after(node)
            node = node.child(node.ranks.drafted[0])
        return probability

    def acceptance_after(self, node: Node) -> float:
        """Probability that the token drafted after a computed node is accepted, given that the node's was."""
        assert node.ranks is not None, "only computed nodes have a token drafted after them"
        return node.ranks.probabilities[0] if self._is_best_first else self.spread.acceptance

    def drafted_now(self, limit: int) -> tuple[list[int], bool]:
        """Tokens drafted right after the last committed one, and whether there can be no more."""
        tokens, tip = self.tree.root.chain(limit)
        return tokens, len(tokens) >= limit or self.is_end(tip)

    def start_round(self, draft_tokens: list[int], spread: GuessSpread) -> None:
        """Begin a round in which the target verifies `draft_tokens`."""
        self.tree.set_path(draft_tokens)
        self.spread = spread
        self.pushed.clear()
