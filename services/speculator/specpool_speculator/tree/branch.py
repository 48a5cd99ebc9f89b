"""What is drafted for one guess, kept as it grows: a step looks at the branches it extended, not at all of them."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

from specpool_speculator.tree.node import Node

if TYPE_CHECKING:
    from specpool_speculator.tree.sequence import Guess, SequenceState

_FIRST_TOKEN: Final = 4.0
"""Value of a guess's first token beside a further one's: with none, a round verifies nothing that was drafted."""


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


def find_branches(sequence: SequenceState) -> Branches:
    """The branches of a sequence, from its tree."""
    found, last, best = list[Branch](), len(sequence.tree.path) - 1, True
    for guess in sequence.guesses():
        is_open = guess.probability > 0 and not sequence.is_end(guess.node)
        is_best = is_open and best and guess.outcome[0] == last
        best = best and not is_best
        branch = Branch(guess, is_best, [], guess.node)
        _extend(branch, sequence)
        found.append(branch)
    return Branches(sequence.tree.version, found, list(found))


def extend_branches(branches: Branches, sequence: SequenceState, nodes: Iterable[Node]) -> bool:
    """Lengthen the branches whose tips are among `nodes`, computed just now; False if a node is at no branch's tip."""
    for node in nodes:
        branch = next((one for one in branches.all if one.tip is node), None)
        if branch is None:
            return False
        _extend(branch, sequence)
        branches.grown.append(branch)
    return True


def _extend(branch: Branch, sequence: SequenceState) -> None:
    """Follow the chain as far as it is computed, and see what could be drafted next."""
    lookahead, tip = sequence.options.lookahead, branch.tip
    while tip.ranks is not None and len(branch.tokens) <= lookahead:
        branch.chain_probability *= sequence.acceptance_after(tip)
        branch.tokens.append(tip.ranks.drafted[0])
        tip = tip.child(branch.tokens[-1])
    branch.tip = tip
    guess, num_tokens = branch.guess, len(branch.tokens)
    if guess.probability == 0 or sequence.is_end(guess.node) or num_tokens > lookahead or sequence.is_end(tip):
        branch.candidate = None
        return
    value = guess.probability * (branch.chain_probability if num_tokens else _FIRST_TOKEN)
    branch.candidate = Candidate(value, sequence, tip, num_tokens < lookahead or branch.is_best)
