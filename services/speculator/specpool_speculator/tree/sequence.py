"""One sequence of one target, as the speculator holds it."""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Final

from specpool.algorithm.verification import VerificationMode
from specpool_speculator.engine.estimates import GuessSpread
from specpool_speculator.tree.draft_tree import DraftTree
from specpool_speculator.tree.node import Node
from specpool_speculator.tree.options import SequenceOptions

SequenceKey = tuple[int, str]
"""A sequence's key (connection, sequence id): two targets may use the same id."""
Outcome = tuple[int, int]
"""A verification outcome (accepted length k, bonus token t*)."""
_FIRST_TOKEN: Final = 4.0
"""Value of a guess's first token beside a further one's: with none, a round verifies nothing that was drafted."""


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


@dataclass(eq=False, slots=True)
class Candidate:
    """A branch row that could be run."""

    value: float
    """Probability that what it drafts is used; the first token after a guess counts more."""
    sequence: SequenceState
    """The sequence that the branch belongs to."""
    node: Node
    """The uncomputed node at the branch's tip."""
    is_worth_a_step: bool
    """Whether the row is worth a step of its own; else it only runs together with others that are."""


@dataclass(eq=False, slots=True)
class Branch:
    """A guess and the chain of tokens drafted for it so far, one more than the lookahead at most."""

    guess: Guess
    """The outcome that is guessed."""
    is_best: bool
    """Whether it is the likeliest outcome of all tokens accepted: one token more than the lookahead is of use there."""
    tokens: list[int]
    """Tokens drafted after the guessed bonus token."""
    tip: Node
    """The node after the last of them, which is not computed unless the chain is as long as it gets."""
    chain_probability: float = 1.0
    """Probability that all `tokens` are accepted, if the guess is right."""
    candidate: Candidate | None = None
    """The row that would make it longer; None if nothing is to be drafted after it."""


@dataclass(eq=False, slots=True)
class Branches:
    """The branches of a sequence's running round, as of one version of its tree."""

    version: int
    """The tree's version that they were found in."""
    all: list[Branch]
    """All branches, by accepted length, then rank."""
    grown: list[Branch] = field(default_factory=list)
    """Those that are new or longer since this list was last emptied."""


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
        """Lengthen the branches whose tips are among `nodes`, computed just now."""
        branches = self._branches
        if branches is None:
            return
        for node in nodes:
            branch = next((one for one in branches.all if one.tip is node), None)
            if branch is None:  # drafted for a target that waits: what it is a guess of is found anew
                self._branches = None
                return
            self._follow(branch)
            branches.grown.append(branch)

    def _current_branches(self) -> Branches:
        if self._branches is None or self._branches.version != self.tree.version:
            found = self._find_branches()
            self._branches = Branches(self.tree.version, found, list(found))
        return self._branches

    def _find_branches(self) -> list[Branch]:
        found, last, best = list[Branch](), len(self.tree.path) - 1, True
        for guess in self.guesses():
            is_best = best and guess.outcome[0] == last and guess.probability > 0 and not self.is_end(guess.node)
            best = best and not is_best
            branch = Branch(guess, is_best, [], guess.node)
            self._follow(branch)
            found.append(branch)
        return found

    def _follow(self, branch: Branch) -> None:
        """Follow a branch's chain as far as it is computed, and see what could be drafted next."""
        lookahead, tip, guess = self.options.lookahead, branch.tip, branch.guess
        while tip.ranks is not None and len(branch.tokens) <= lookahead:
            branch.chain_probability *= self.acceptance_after(tip)
            branch.tokens.append(tip.ranks.drafted[0])
            tip = tip.child(branch.tokens[-1])
        branch.tip = tip
        branch.candidate, num_tokens = None, len(branch.tokens)
        if guess.probability > 0 and num_tokens <= lookahead and not self.is_end(guess.node) and not self.is_end(tip):
            value = guess.probability * (branch.chain_probability if num_tokens else _FIRST_TOKEN)
            branch.candidate = Candidate(value, self, tip, num_tokens < lookahead or branch.is_best)

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
