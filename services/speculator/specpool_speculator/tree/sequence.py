"""One sequence of one target, as the speculator holds it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Final

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


@dataclass(eq=False, slots=True)
class Branch:
    """A guessed outcome of the running round, and the chain of tokens drafted for it so far.

    The chain is at most one token longer than the lookahead. Its tip is the node `token` after `parent`, which is made
    when it is scheduled: most tips never are.
    """

    sequence: SequenceState
    """The sequence that the branch belongs to."""
    outcome: Outcome
    """The outcome that is guessed."""
    probability: float
    """Probability that this is the outcome; 0 for branches left over from earlier rounds, which are not extended."""
    parent: Node
    """The computed node before the tip."""
    token: int
    """Token of the tip."""
    is_closed: bool
    """Whether nothing is to be drafted after the guessed token."""
    is_best: bool
    """Whether it is the likeliest outcome of all tokens accepted: one token more than the lookahead is of use there."""
    tokens: list[int] = field(default_factory=list)
    """Tokens drafted after the guessed bonus token."""
    chain_probability: float = 1.0
    """Probability that all `tokens` are accepted, if the guess is right."""
    value: float = 0.0
    """Probability that what a row at the tip drafts is used; the first token after a guess counts more."""
    is_open: bool = False
    """Whether a row at the tip would make the branch longer."""
    is_worth_a_step: bool = False
    """Whether that row is worth a step of its own; else it only runs together with others that are."""

    @property
    def node(self) -> Node:
        """The tip, which is not computed unless the chain is as long as it gets."""
        return self.parent.child(self.token)


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
        """Guessed outcomes of the running round and what is drafted for each, by accepted length, then rank."""
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
            parent, token = node.parent, node.token
            for branch in branches.all:
                if branch.token == token and branch.parent is parent:
                    self._follow(branch)
                    branches.grown.append(branch)
                    break
            else:  # drafted for a target that waits: what it is a guess of is found anew
                self._branches = None
                return

    def _current_branches(self) -> Branches:
        if self._branches is None or self._branches.version != self.tree.version:
            found = self.find_branches()
            self._branches = Branches(self.tree.version, found, list(found))
        return self._branches

    def find_branches(self) -> list[Branch]:
        """What `branches` gives, found in the tree anew."""
        path, found, has_best = self.tree.path, list[Branch](), False
        stops, max_length, lookahead = self.options.stop_tokens, self.options.max_length, self.options.lookahead
        chosen = self._best_first() if self._is_best_first else self._by_fan_out()
        for k, (node, ranked) in enumerate(zip(path, chosen, strict=False)):
            is_last = k + 1 == len(path)
            is_too_long = node.position + 2 >= max_length
            children = node.children
            for token, probability in ranked:
                is_closed = probability == 0 or is_too_long or token in stops
                is_best = is_last and not is_closed and not has_best
                has_best = has_best or is_best
                # As `_follow` leaves a branch of which nothing is computed yet: most are like that.
                value, is_worth_it = probability * _FIRST_TOKEN, lookahead > 0 or is_best
                branch = Branch(self, (k, token), probability, node, token, is_closed, is_best, value=value)
                branch.is_open, branch.is_worth_a_step = not is_closed, is_worth_it
                found.append(branch)
                if token in children:
                    self._follow(branch)
            if children:
                expected = {token for token, _ in ranked}
                if not is_last:
                    expected.add(path[k + 1].token)
                for token, child in children.items():
                    if child.ranks is not None and token not in expected:
                        found.append(branch := Branch(self, (k, token), 0.0, node, token, True, False))
                        self._follow(branch)
        return found

    def _follow(self, branch: Branch) -> None:
        """Follow a branch's chain as far as it is computed, and see what could be drafted next."""
        lookahead, parent, token, tokens = self.options.lookahead, branch.parent, branch.token, branch.tokens
        child = parent.children.get(token)
        while child is not None and child.ranks is not None and len(tokens) <= lookahead:
            branch.chain_probability *= self.acceptance_after(child)
            parent, token = child, child.ranks.drafted[0]
            tokens.append(token)
            child = parent.children.get(token)
        branch.parent, branch.token = parent, token
        branch.is_open = not branch.is_closed and len(tokens) <= lookahead
        if branch.is_open and tokens:
            branch.is_open = parent.position + 2 < self.options.max_length and token not in self.options.stop_tokens
        branch.value = branch.probability * (branch.chain_probability if tokens else _FIRST_TOKEN)
        branch.is_worth_a_step = len(tokens) < lookahead or branch.is_best

    @property
    def _is_best_first(self) -> bool:
        return self.spread.budget > 0

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
        reached, budget = 1.0, self.spread.budget
        guesses, values = list[list[tuple[int, float]]](), list[float]()
        for node, draft_token in self._open_path():
            ranks = node.ranks
            assert ranks is not None, "computed"
            ranked = [(token, reached * p) for token, p in zip(ranks.drafted, ranks.probabilities, strict=True)]
            if draft_token is not None:
                if ranks.drafted[0] == draft_token:
                    del ranked[0]
                else:
                    ranked = [one for one in ranked if one[0] != draft_token]
                reached *= ranks.probability(draft_token)
            guesses.append(ranked)
            values += [value for _, value in ranked]
        if len(values) <= budget:
            return guesses
        # Numbers are sorted sooner than what they are of. Of equal ones, those after fewer accepted tokens are taken.
        values.sort(reverse=True)
        least = values[budget - 1]
        num_left_out = sum(value == least for value in values[budget:])
        for k in range(len(guesses) - 1, -1, -1):
            guesses[k] = [one for one in guesses[k] if one[1] >= least]
            while num_left_out and guesses[k] and (last := _last_of(guesses[k], least)) is not None:
                del guesses[k][last]
                num_left_out -= 1
        return guesses

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


def _last_of(ranked: list[tuple[int, float]], value: float) -> int | None:
    """Index of the last guess with that value."""
    return next((index for index in range(len(ranked) - 1, -1, -1) if ranked[index][1] == value), None)
