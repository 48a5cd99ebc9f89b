"""One sequence of one target, as the speculator holds it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from specpool.algorithm.sampling import SamplingParams
from specpool.algorithm.verification import VerificationMode
from specpool_speculator.draft_tree import DraftTree, Node
from specpool_speculator.estimates import GuessPlan

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
    """Tree, plan of the running round, and what the target was told."""

    key: SequenceKey
    """Its connection and id."""
    options: SequenceOptions
    """As opened."""
    tree: DraftTree
    """Everything drafted."""
    plan: GuessPlan
    """Fan-out of the running round."""
    request: Request | None = None
    """What the target waits for."""
    awaits_start: bool = False
    """The last outcome did not say what is verified next; `start_round` will."""
    pushed: dict[Outcome, int] = field(default_factory=dict)
    """Entries of the running round's table that were pushed, with their number of tokens."""

    def is_end(self, node: Node) -> bool:
        """Whether nothing is to be drafted after `node`."""
        stops = self.options.stop_tokens
        return node.position + 1 >= self.options.max_length or (node.token in stops and node.parent is not None)

    def guesses(self) -> Iterator[Guess]:
        """Guessed outcomes of the running round, in order of accepted length, then rank."""
        path = self.tree.path
        for k, node in enumerate(path):
            if not node.is_computed or (k and self.is_end(node)):
                return
            draft_token = path[k + 1].token if k + 1 < len(path) else None
            probabilities = self.plan.probabilities[k]
            ranked = list(zip(node.guesses(draft_token), probabilities, strict=False))
            for token, probability in ranked:
                yield Guess((k, token), node.child(token), probability)
            expected = {token for token, _ in ranked}
            for token, child in list(node.children.items()):
                if child.is_computed and token != draft_token and token not in expected:
                    yield Guess((k, token), child, 0.0)

    def drafted_now(self, limit: int) -> tuple[list[int], bool]:
        """Tokens drafted right after the last committed one, and whether there can be no more."""
        tokens, tip = self.tree.root.chain(limit)
        return tokens, len(tokens) >= limit or self.is_end(tip)

    def start_round(self, draft_tokens: list[int], plan: GuessPlan) -> None:
        """The target verifies `draft_tokens` from now on."""
        self.tree.set_path(draft_tokens)
        self.plan = plan
        self.pushed.clear()
