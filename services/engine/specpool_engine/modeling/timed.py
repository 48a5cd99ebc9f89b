"""Models that take a given time, as a device beside the interpreter does: host time is measured with them.

A timed model computes the logits of a toy (`toy`) of the same numbers, from a table made when it is loaded. All of
its own work lies within the forward's time, and for the rest of it the thread sleeps, so that whoever else is in the
process has the interpreter, as while a GPU computes. By what such a system is slower than the times of its models, the
host is to blame.

Shapes: T = tokens of all segments, R = rows of logits, V = vocabulary size.
"""

from __future__ import annotations

import ctypes
import time
from collections.abc import Callable, Sequence
from typing import Final

import numpy as np
import torch
from torch import Tensor

from specpool.errors import InvalidArgument
from specpool_engine.modeling.interface import Segment, check_segments
from specpool_engine.modeling.paged_kv import BlockPool, reserve_all
from specpool_engine.modeling.toy import ToyTable

MAX_VOCAB_SIZE: Final = 256
"""Largest vocabulary: the table has that many numbers to the power of three."""
_PR_SET_TIMERSLACK: Final = 29
_SLACK_NS: Final = 1_000


class TimedModel:
    """A `CausalModel` whose forward lasts `step_ms` and `row_ms` per token, whatever it computes meanwhile."""

    def __init__(
        self, table: ToyTable, pool: BlockPool, *, max_context: int = 4096, step_ms: float = 0.0, row_ms: float = 0.0
    ) -> None:
        """Compute the table of all pairs of tokens. Raises InvalidArgument for more than `MAX_VOCAB_SIZE` tokens."""
        if table.vocab_size > MAX_VOCAB_SIZE:
            raise InvalidArgument(f"a timed model has at most {MAX_VOCAB_SIZE} tokens, got {table.vocab_size}")
        self.vocab_size = table.vocab_size
        self.max_context = max_context
        self.pool = pool
        self.device = torch.device("cpu")
        self.step_ms = step_ms
        self.row_ms = row_ms
        pairs = range(-1, table.vocab_size)
        # By the token before last, of which there is none before the first token (index -1, so the last row), and last.
        rows = [table.logits(before, last) for before in [*pairs[1:], -1] for last in pairs[1:]]
        self._logits = torch.stack(rows)
        # One token per slot, where a real model has keys and values.
        self._slots = np.full(pool.num_blocks * pool.block_size, -1, dtype=np.int64)
        self._is_precise = False

    def forward(self, segments: Sequence[Segment]) -> Tensor:
        """Logits [R, V] after the time of T tokens."""
        return self.launch(segments)()

    def launch(self, segments: Sequence[Segment]) -> Callable[[], Tensor]:
        """Start a forward; what is returned sleeps until its end, and gives the logits [R, V]."""
        started_s = time.perf_counter()
        check_segments(segments, max_context=self.max_context, vocab_size=self.vocab_size)
        reserve_all(self.pool, [(segment.kv, len(segment.tokens)) for segment in segments])
        self._copy()
        num_tokens, pairs = 0, list[int]()
        for segment in segments:
            self._write(segment)
            pairs += self._pairs(segment)
            segment.kv.advance(len(segment.tokens))
            num_tokens += len(segment.tokens)
        logits = self._logits[torch.tensor(pairs, dtype=torch.int64)]
        end_s = started_s + (self.step_ms + self.row_ms * num_tokens) / 1e3

        def wait() -> Tensor:
            self._sleep_until(end_s)
            return logits

        return wait

    def _copy(self) -> None:
        sources, destinations = self.pool.take_copies()
        if destinations:
            blocks = self._slots.reshape(self.pool.num_blocks, self.pool.block_size)
            blocks[destinations] = blocks[sources]

    def _write(self, segment: Segment) -> None:
        size, done, position = self.pool.block_size, 0, segment.kv.length
        while done < len(segment.tokens):
            offset = position % size
            part = segment.tokens[done : done + size - offset]
            slot = segment.kv.block_ids[position // size] * size + offset
            self._slots[slot : slot + len(part)] = part
            done += len(part)
            position += len(part)

    def _pairs(self, segment: Segment) -> list[int]:
        """Rows of the table for the last `num_logits` tokens of a segment."""
        first = len(segment.tokens) - segment.num_logits
        tokens = segment.tokens[first:]
        if not tokens:
            return []
        before = segment.tokens[first - 1] if first else self._token_before(segment)
        size = self.vocab_size
        return [one * size + last for one, last in zip((before, *tokens[:-1]), tokens, strict=True)]

    def _token_before(self, segment: Segment) -> int:
        """The token before a segment, read through its block table; that of the last table row at the very start."""
        position = segment.kv.length - 1
        if position < 0:
            return self.vocab_size
        size = self.pool.block_size
        return int(self._slots[segment.kv.block_ids[position // size] * size + position % size])

    def _sleep_until(self, end_s: float) -> None:
        if not self._is_precise:
            self._is_precise = True
            # Of this thread: else the kernel wakes it up to 50 us late. Linux; elsewhere it stays as it is.
            prctl = getattr(ctypes.CDLL(None), "prctl", None)
            if prctl is not None:
                prctl(_PR_SET_TIMERSLACK, _SLACK_NS, 0, 0, 0)
        left_s = end_s - time.perf_counter()
        if left_s > 0:
            time.sleep(left_s)
