"""One sequence of one target, as the speculator holds it."""

from __future__ import annotations

import heapq
from collections.abc import Iterator
from dataclasses import dataclass, field

from specpool.algorithm.sampling import SamplingParams
from specpool.algorithm.verification import VerificationMode
from specpool_speculator.engine.estimates import GuessSpread
from specpool_speculator.tree.draft_tree import DraftTree
from specpool_speculator.tree.node import Node

SequenceKey = tuple[int, str]
"""(connection, sequence id): two targets may use the same id."""
Outcome = tuple[int, int]
"""(accepted length, bonus token)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SequenceOptions:
    """What a target said when it opened the sequence."""

    tenant: str
    """For sharing rows."""
    weight: float
    """Of the tenant."""
    sampling: SamplingParams
    """Of the request."""
    verification: VerificationMode
    """How the target verifies."""
    seed: int
    """Of the noise."""
    num_prompt_tokens: int
    """The first tokens that are the prompt."""
    lookahead: int
    """K."""
    speculates_ahead: bool
    """True for mode SSD; the synchronous baseline drafts only when asked."""
    sends_distributions: bool
    """Whether the target needs the distributions of draft tokens."""
    vocab_size: int
    """Tokens the target knows; the draft's table may be longer."""
    stop_tokens: frozenset[int]
    """Nothing is drafted after these."""
    max_length: int
    """Tokens beyond this are never needed or cannot be computed."""


@dataclass(slots=True)
class Request:
    """A pending `speculate_now`."""

    round: int
    """Its round, to be echoed."""
    num_tokens: int
    """Answer as soon as that many are drafted."""
    deadline_s: float
    """Answer with what there is then (monotonic clock)."""


@dataclass(frozen=True, slots=True)
class Guess:
    """A guessed outcome of the running round."""

    outcome: Outcome
    """What is guessed."""
    node: Node
    """The bonus token's node; the drafted tokens are the chain below."""
    probability: float
    """That this is the outcome; 0 for branches left over from earlier rounds, which are not extended."""


@dataclass(slots=True)
class SequenceState:
    """Tree, spread of the running round, and what the target was told."""

    key: SequenceKey
    """Its connection and id."""
    options: SequenceOptions
    """As opened."""
    tree: DraftTree
    """Everything drafted."""
    spread: GuessSpread
    """Fan-out of the running round."""
    request: Request | None = None
    """What the target waits for."""
    outcome_s: float | None = None
    """When the last outcome came (monotonic clock)."""
    awaits_start: bool = False
    """The last outcome did not say what is verified next; `start_round` will."""
    is_dense: bool = False
    """Whether draft tokens are sampled from distributions over all tokens, which a process group can carry."""
    pushed: dict[Outcome, int] = field(default_factory=dict)
    """Entries of the running round's table that were pushed, with their number of tokens."""

    def is_end(self, node: Node) -> bool:
        """Whether nothing is to be drafted after `node`."""
        stops = self.options.stop_tokens
        return node.position + 1 >= self.options.max_length or (node.token in stops and node.parent is not None)

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
        """The same, chosen by the draft's probabilities along the path."""
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
        """That the first `num_tokens` tokens drafted after `node` are accepted, given that `node` was."""
        if not self._is_best_first:
            return self.spread.acceptance**num_tokens
        probability = 1.0
        for _ in range(num_tokens):
            assert node.ranks is not None, "it has drafted tokens"
            probability *= node.ranks.probabilities[0]
            node = node.child(node.ranks.drafted[0])
        return probability

    def drafted_now(self, limit: int) -> tuple[list[int], bool]:
        """Tokens drafted right after the last committed one, and whether there can be no more."""
        tokens, tip = self.tree.root.chain(limit)
        return tokens, len(tokens) >= limit or self.is_end(tip)

    def start_round(self, draft_tokens: list[int], spread: GuessSpread) -> None:
        """The target verifies `draft_tokens` from now on."""
        self.tree.set_path(draft_tokens)
        self.spread = spread
        self.pushed.clear()
