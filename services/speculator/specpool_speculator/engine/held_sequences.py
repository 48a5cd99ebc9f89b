"""The sequences of all targets, and what targets say about them: opened, outcomes applied, closed, refused.

One thread owns it. Time comes in as an argument; responses are collected in `outbox`. Whatever is wrong with a message
about a sequence ends that sequence alone.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Final

from specpool.algorithm.verification import VerificationMode
from specpool.errors import InvalidArgument
from specpool.v1 import speculator_pb2
from specpool_engine.modeling.paged_kv import BlockPool
from specpool_speculator.dense.sending_group import Channel
from specpool_speculator.engine import checks
from specpool_speculator.engine.estimates import Estimates
from specpool_speculator.engine.opened_sequence import DraftLimits, sequence_options
from specpool_speculator.engine.outbox import Outbox
from specpool_speculator.engine.refusals import RETRY_AFTER_MS, Refusals, Refused
from specpool_speculator.engine.room import has_room
from specpool_speculator.engine.spans import SequenceSpans
from specpool_speculator.engine.step_stats import DraftCounters
from specpool_speculator.tree.draft_tree import DraftTree
from specpool_speculator.tree.node import Node
from specpool_speculator.tree.sequence import Request, SequenceKey, SequenceState

_logger = logging.getLogger(__name__)
_MAX_ROOMLESS_S: Final = 0.5
"""Longest time without memory; a sequence that waits for longer is better served elsewhere."""


class HeldSequences:
    """The sequences held, by connection and sequence id."""

    def __init__(
        self,
        pool: BlockPool,
        limits: DraftLimits,
        estimates: Mapping[VerificationMode, Estimates],
        *,
        max_sequences: int,
        on_outcome: Callable[[SequenceState, int, float], None],
    ) -> None:
        """`on_outcome` is told of a sequence, the tokens that its round committed, and when the outcome came."""
        self.outbox = Outbox()
        self.counters = DraftCounters()
        self.refusals = Refusals()
        self._pool = pool
        self._limits = limits
        self._estimates = estimates
        self._max_sequences = max_sequences
        self._on_outcome = on_outcome
        self._vocab_sizes: dict[int, int] = {}
        self._channels: dict[int, Channel] = {}
        self._sequences: dict[SequenceKey, SequenceState] = {}
        self._roomless_since_s: dict[SequenceKey, float] = {}
        self._spans = SequenceSpans()
        self._lessons: list[tuple[Estimates, Sequence[Node], int, int]] = []
        """Outcomes that nothing was learned from yet: estimates, in-flight path, accepted length, bonus token."""

    def __len__(self) -> int:
        return len(self._sequences)

    def __iter__(self) -> Iterator[SequenceState]:
        return iter(self._sequences.values())

    def __getitem__(self, key: SequenceKey) -> SequenceState:
        return self._sequences[key]

    def holds(self, sequence: SequenceState) -> bool:
        """Whether the sequence has not ended."""
        return self._sequences.get(sequence.key) is sequence

    @property
    def num_targets(self) -> int:
        """Number of open streams."""
        return len(self._vocab_sizes)

    def next_deadline_s(self) -> float | None:
        """Time (monotonic) by which the next waiting target is to be answered; None if none waits."""
        return min((s.request.deadline_s for s in self if s.request), default=None)

    # ---- streams ----------------------------------------------------------------------------------------------

    def connect(self, connection: int, vocab_size: int) -> None:
        """Register a target whose stream was acknowledged."""
        self._vocab_sizes[connection] = vocab_size

    def disconnect(self, connection: int) -> None:
        """Free everything of a target whose stream ended, in whatever way."""
        self._vocab_sizes.pop(connection, None)
        self._channels.pop(connection, None)
        for key in [key for key in self._sequences if key[0] == connection]:
            self._free(key)
        self.refusals.disconnect(connection)
        self.outbox.drop(connection)

    def set_channel(self, connection: int, channel: Channel) -> None:
        """Sample this target's draft tokens from dense distributions from now on: `channel` can send them."""
        if connection in self._vocab_sizes:
            self._channels[connection] = channel
            self._update_dense(connection)

    def drop_channel(self, connection: int, channel: Channel) -> None:
        """Stop using a channel that is gone; another one may have taken its place."""
        if self._channels.get(connection) is channel:
            del self._channels[connection]
            self._update_dense(connection)

    def _update_dense(self, connection: int) -> None:
        for sequence in self:
            if sequence.key[0] == connection:
                sequence.is_dense = self._is_dense(sequence)

    def _is_dense(self, sequence: SequenceState) -> bool:
        return sequence.options.verification is VerificationMode.REJECTION and sequence.key[0] in self._channels

    # ---- messages ---------------------------------------------------------------------------------------------

    def apply(self, connection: int, request: speculator_pb2.SpeculateRequest, received_s: float) -> None:
        """Take in one message of a connected target."""
        if connection not in self._vocab_sizes:
            self.counters.num_stale += 1
            return
        match request.WhichOneof("message"):
            case "outcomes":
                for outcome in request.outcomes.outcomes:
                    self._take(self._apply_outcome, connection, outcome, received_s)
            case "open_sequence":
                self._take(self._open, connection, request.open_sequence, received_s)
            case "speculate_now":
                self._take(self._speculate_now, connection, request.speculate_now, received_s)
            case "start_round":
                self._take(self._start_round, connection, request.start_round, received_s)
            case "close_sequence":
                self._free((connection, request.close_sequence.sequence_id))
            case _:
                self.counters.num_stale += 1

    def _take(
        self, action: Callable[[SequenceKey, Any, float], None], connection: int, message: Any, received_s: float
    ) -> None:
        """Call `action` with a message; whatever comes of it, the other sequences go on."""
        key = (connection, message.sequence_id)
        try:
            action(key, message, received_s)
        except Refused as refusal:
            self._refuse(key, refusal)
        except InvalidArgument as error:
            self._refuse(key, Refused(speculator_pb2.REFUSAL_REASON_INVALID, error.message))
        except Exception as error:
            self.fail(key, error)

    def _open(self, key: SequenceKey, message: speculator_pb2.OpenSequence, _: float) -> None:
        self._free(key)
        if len(self) >= self._max_sequences:
            text = f"{self._max_sequences} sequences are held here, and no more are taken"
            raise Refused(speculator_pb2.REFUSAL_REASON_TOO_MANY_SEQUENCES, text, retry_after_ms=RETRY_AFTER_MS)
        checks.check_open(message, vocab_size=self._limits.vocab_size, max_context=self._limits.max_context)
        options = sequence_options(message, self._limits, self._vocab_sizes[key[0]])
        tree = DraftTree(self._pool, message.token_ids, round_=message.round, salt=message.cache_salt.hex())
        if not has_room(self._pool, tree, [sequence.tree for sequence in self]):
            tree.free()
            raise _no_room(f"{len(message.token_ids)} tokens do not fit into the KV cache beside the others")
        self.counters.opened(len(message.token_ids), tree.num_cached)
        tree.set_path(message.draft_tokens)
        spread = self._estimates[options.verification].spread(len(message.draft_tokens))
        sequence = self._sequences[key] = SequenceState(key, options, tree, spread)
        sequence.is_dense = self._is_dense(sequence)
        self._spans.open(key, message.traceparent, options)

    def _apply_outcome(self, key: SequenceKey, outcome: speculator_pb2.Outcome, received_s: float) -> None:
        checks.check_outcome(outcome, self._limits.vocab_size)
        sequence = self._find(key, outcome.round)
        if sequence is None:
            return
        tree = sequence.tree
        if outcome.num_accepted >= len(tree.path):
            text = f"round {outcome.round}: {outcome.num_accepted} of {len(tree.path) - 1} draft tokens accepted"
            self._resync(key, text)
            return
        num_tokens = len(tree.tokens) + outcome.num_accepted + 1
        if num_tokens > self._limits.max_context:  # nothing can be drafted for it any more
            text = f"{num_tokens} tokens are beyond the draft's context of {self._limits.max_context}"
            raise Refused(speculator_pb2.REFUSAL_REASON_INVALID, text)
        self._observe(sequence, outcome)
        self._on_outcome(sequence, outcome.num_accepted + 1, received_s)
        sequence.request = None
        self.counters.num_dropped_branches += max(0, len(sequence.pushed) - 1)
        tree.commit(outcome.num_accepted, outcome.bonus_token)
        sequence.awaits_start = outcome.awaits_speculation
        self._set_path(sequence, list(outcome.draft_tokens), outcome.draft_source)

    def _observe(self, sequence: SequenceState, outcome: speculator_pb2.Outcome) -> None:
        estimates, k = self._estimates[sequence.options.verification], outcome.num_accepted
        self._lessons.append((estimates, sequence.tree.path, k, outcome.bonus_token))
        num_drafted = sequence.pushed.get((k, outcome.bonus_token))
        self._spans.round(sequence, num_accepted=k, num_drafted=num_drafted)

    def learn(self) -> None:
        """Learn from the outcomes since the last call, when nobody waits for it."""
        lessons, self._lessons = self._lessons, []
        for estimates, path, num_accepted, bonus_token in lessons:
            try:
                estimates.observe_outcome(path, num_accepted, bonus_token)
            except Exception:  # its sequence is drafted for all the same
                _logger.exception("nothing was learned from an outcome")

    def _start_round(self, key: SequenceKey, message: speculator_pb2.StartRound, _: float) -> None:
        checks.check_draft(message.round, message.draft_tokens, self._limits.vocab_size)
        sequence = self._find(key, message.round)
        if sequence is not None:
            sequence.request = None
            sequence.awaits_start = False
            self._set_path(sequence, list(message.draft_tokens), message.draft_source)

    def _set_path(
        self, sequence: SequenceState, draft_tokens: list[int], source: speculator_pb2.DraftSource.ValueType
    ) -> None:
        sequence.start_round(draft_tokens, self._estimates[sequence.options.verification].spread(len(draft_tokens)))
        is_ours = source == speculator_pb2.DRAFT_SOURCE_SPECULATOR and bool(draft_tokens)
        if is_ours and sequence.options.sends_distributions:
            channel = self._channels.get(sequence.key[0])
            self.outbox.distributions(sequence, sequence.tree.distributions(), channel)

    def _speculate_now(self, key: SequenceKey, message: speculator_pb2.SpeculateNow, received_s: float) -> None:
        checks.check_speculate_now(message)
        sequence = self._find(key, message.round + 1)
        if sequence is None or len(sequence.tree.path) > 1:
            if key not in self.refusals:
                self.outbox.speculation(*key, message.round, ())
            return
        num_tokens = min(message.num_tokens, sequence.options.lookahead)
        deadline_s = received_s + min(message.deadline_ms, checks.MAX_DEADLINE_MS) / 1e3
        sequence.request = Request(message.round, num_tokens, deadline_s)
        sequence.awaits_start = True

    def _find(self, key: SequenceKey, round_: int) -> SequenceState | None:
        """The sequence if it is in that round; else count, and ask for it again unless the message is merely late."""
        sequence = self._sequences.get(key)
        if sequence is not None and sequence.tree.round == round_:
            return sequence
        self.counters.num_stale += 1
        if sequence is None and key not in self.refusals:
            self._resync(key, "the sequence is not held here")
        elif sequence is not None and round_ > sequence.tree.round:
            self._resync(key, f"round {round_} announced, {sequence.tree.round} is running here")
        return None

    # ---- the ends of a sequence -------------------------------------------------------------------------------

    def refuse_roomless(self, keys: Sequence[SequenceKey], now_s: float) -> None:
        """Refuse those of `keys` that have waited too long for memory, which the others fill."""
        if not keys and not self._roomless_since_s:
            return
        self._roomless_since_s = {key: self._roomless_since_s.get(key, now_s) for key in keys}
        for key, since_s in self._roomless_since_s.items():
            if now_s - since_s > _MAX_ROOMLESS_S and key in self._sequences:
                self._refuse(key, _no_room("the KV cache has had no room for the sequence beside the others"))

    def fail(self, key: SequenceKey, error: Exception) -> None:
        """End a sequence with which something went wrong; the others go on."""
        _logger.error("sequence %s of connection %d failed", key[1], key[0], exc_info=error)
        refusal = Refused(speculator_pb2.REFUSAL_REASON_INTERNAL, f"{type(error).__name__}: {error}")
        self._refuse(key, refusal, publish=False)  # nobody knows how far its KV goes

    def _resync(self, key: SequenceKey, reason: str) -> None:
        self._free(key)
        self.counters.num_resyncs += 1
        self.outbox.resync(*key, reason)

    def _refuse(self, key: SequenceKey, refusal: Refused, *, publish: bool = True) -> None:
        if key in self.refusals:  # what comes after a refusal is ignored, however bad
            return
        self._free(key, publish=publish)
        self.refusals.add(key, refusal.reason)
        self.outbox.refused(key, refusal)

    def _free(self, key: SequenceKey, *, publish: bool = True) -> None:
        self.refusals.discard(key)
        sequence = self._sequences.pop(key, None)
        if sequence is None:
            return
        try:
            self._spans.close(key)
            if publish:
                sequence.tree.publish()
        except Exception:  # its end is no reason to end others
            _logger.exception("sequence %s of connection %d did not end well", key[1], key[0])
        try:
            sequence.tree.free()
        except Exception:  # what failed before may have left it half done
            _logger.exception("sequence %s of connection %d could not be freed", key[1], key[0])


def _no_room(text: str) -> Refused:
    return Refused(speculator_pb2.REFUSAL_REASON_KV_CACHE_FULL, text, retry_after_ms=RETRY_AFTER_MS)
