"""A target without a model: it keeps the truth, sends messages to a `Drafter`, and takes in its answers."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch

from specpool.algorithm.draft_ranks import draft_ranks
from specpool.algorithm.sampling import SamplingParams, process_logits
from specpool.algorithm.verification import VerificationMode
from specpool.v1 import speculator_pb2, types_pb2
from specpool_engine.modeling.paged_kv import BlockPool
from specpool_engine.modeling.toy import ToyModel, ToyTable
from specpool_engine.runtime.sampling_messages import sampling_to_proto
from specpool_speculator.config import SpeculatorConfig
from specpool_speculator.engine.drafter import Drafter

VOCAB_SIZE = 24
CONNECTION = 1


def make_drafter(num_blocks: int = 600, *, block_size: int = 4, **settings: Any) -> tuple[Drafter, ToyModel]:
    """A drafter over a toy model."""
    model = ToyModel(ToyTable(VOCAB_SIZE, 1), BlockPool(num_blocks, block_size))
    defaults = {"model": "toy#", "max_lookahead": 3, "fan_out_budget": 8, "row_budget": 6, "skip_costly_rows": False}
    drafter = Drafter(model, SpeculatorConfig(**{**defaults, **settings}))
    drafter.held.connect(CONNECTION, VOCAB_SIZE)
    return drafter, model


class ScriptedTarget:
    """One sequence of a target."""

    def __init__(
        self,
        drafter: Drafter,
        prompt: Sequence[int],
        *,
        name: str = "s",
        sampling: SamplingParams | None = None,
        mode: types_pb2.SpeculationMode.ValueType = types_pb2.SPECULATION_MODE_SSD,
        verification: types_pb2.VerificationMode.ValueType = types_pb2.VERIFICATION_MODE_COUPLED,
        connection: int = CONNECTION,
        tenant: str = "t",
        weight: float = 1.0,
        lookahead: int = 3,
    ) -> None:
        self.drafter = drafter
        self.name = name
        self.connection = connection
        self.tokens = list(prompt)
        self.num_prompt_tokens = len(prompt)
        self.in_flight: list[int] = []
        self.round = 0
        self.table: dict[tuple[int, int], list[int]] = {}
        self.answers: list[Any] = []
        self.sampling = sampling or SamplingParams(temperature=0, max_tokens=1000, seed=7)
        self._opening: dict[str, Any] = {
            "tenant": tenant,
            "tenant_weight": weight,
            "mode": mode,
            "verification": verification,
            "max_lookahead": lookahead,
        }
        self.open()

    def open(self) -> None:
        """Open the sequence, or open it again."""
        self.send(
            open_sequence=speculator_pb2.OpenSequence(
                sequence_id=self.name,
                token_ids=self.tokens,
                num_prompt_tokens=self.num_prompt_tokens,
                sampling=sampling_to_proto(self.sampling),
                round=self.round,
                draft_tokens=self.in_flight,
                cache_salt=b"salt",
                **self._opening,
            )
        )

    def send(self, **message: Any) -> None:
        """Any message."""
        self.drafter.held.apply(self.connection, speculator_pb2.SpeculateRequest(**message), received_s=0.0)

    def outcome(
        self,
        num_accepted: int,
        bonus: int,
        draft_tokens: Sequence[int] = (),
        *,
        backup: bool = False,
        awaits: bool = False,
    ) -> None:
        """End the running round and start the next."""
        source = speculator_pb2.DRAFT_SOURCE_BACKUP if backup else speculator_pb2.DRAFT_SOURCE_SPECULATOR
        outcome = speculator_pb2.Outcome(
            sequence_id=self.name,
            round=self.round,
            num_accepted=num_accepted,
            bonus_token=bonus,
            draft_tokens=draft_tokens,
            draft_source=source,
            awaits_speculation=awaits,
        )
        self.tokens += [*self.in_flight[:num_accepted], bonus]
        self._start(draft_tokens)
        self.send(outcomes=speculator_pb2.Outcomes(outcomes=[outcome]))

    def start_round(self, draft_tokens: Sequence[int]) -> None:
        """Say what the round that awaited a speculation verifies."""
        self.in_flight = list(draft_tokens)
        self.send(
            start_round=speculator_pb2.StartRound(
                sequence_id=self.name,
                round=self.round,
                draft_tokens=draft_tokens,
                draft_source=speculator_pb2.DRAFT_SOURCE_SPECULATOR,
            )
        )

    def speculate_now(self, num_tokens: int, deadline_ms: float = 1000.0) -> None:
        """Ask for tokens after the outcome that was just sent."""
        self.send(
            speculate_now=speculator_pb2.SpeculateNow(
                sequence_id=self.name, round=self.round - 1, num_tokens=num_tokens, deadline_ms=deadline_ms
            )
        )

    def close(self) -> None:
        """Free the sequence."""
        self.send(close_sequence=speculator_pb2.CloseSequence(sequence_id=self.name))

    def _start(self, draft_tokens: Sequence[int]) -> None:
        self.in_flight = list(draft_tokens)
        self.round += 1
        self.table = {}


def exchange(drafter: Drafter, targets: Sequence[ScriptedTarget], *, num_steps: int = 1, now_s: float = 0.0) -> int:
    """Run up to `num_steps` steps and give every target what is addressed to it; returns the steps done."""
    done = 0
    for attempt in range(num_steps + 1):
        drafter.answer(now_s)
        _distribute(drafter, targets)
        if attempt == num_steps or not drafter.step():
            return done
        done += 1
    return done


def _distribute(drafter: Drafter, targets: Sequence[ScriptedTarget]) -> None:
    by_key = {(target.connection, target.name): target for target in targets}
    for connection, responses in drafter.held.outbox.take().items():
        for response in responses:
            kind = response.WhichOneof("message")
            if kind != "tables":
                message = getattr(response, kind)
                by_key[connection, message.sequence_id].answers.append(message)
                continue
            for table in response.tables.tables:
                target = by_key[connection, table.sequence_id]
                assert table.round == target.round
                for entry in table.entries:
                    _grow(target.table, (entry.num_accepted, entry.bonus_token), list(entry.draft_tokens))


def _grow(table: dict[tuple[int, int], list[int]], outcome: tuple[int, int], tokens: list[int]) -> None:
    known = table.get(outcome, [])
    assert tokens[: len(known)] == known, "an entry's tokens only ever grow"
    assert outcome not in table or len(tokens) > len(known), "only what changed is pushed"
    table[outcome] = tokens


Naive = Callable[[Sequence[int], int], list[int]]


def naive_draft(target: ScriptedTarget, verification: VerificationMode) -> Naive:
    """Drafting without any cache: a full pass over all tokens for every token."""
    table = ToyTable(VOCAB_SIZE, 1)

    def draft(tokens: Sequence[int], num_tokens: int) -> list[int]:
        path = list(tokens)
        for _ in range(num_tokens):
            logits = table.logits(path[-2], path[-1])[None]
            output = path[target.num_prompt_tokens :]
            scores = process_logits(
                logits, target.sampling, prompt_tokens=path[: target.num_prompt_tokens], output_tokens=output
            )
            seed, positions = target.sampling.seed or 0, torch.tensor([len(path)])
            ranks = draft_ranks(scores, verification, 1, seed=seed, positions=positions)
            path.append(int(ranks.token_ids[0, 0]))
        return path[len(tokens) :]

    return draft


@pytest.fixture
def prompt() -> list[int]:
    """Longer than a block."""
    return [3, 1, 4, 1, 5, 9, 2, 6, 5]


def random_outcome(target: ScriptedTarget, rng: random.Random) -> None:
    """A guessed outcome with a part of its tokens, a backup, nothing, or a token nobody guessed."""
    entry = rng.choice([*target.table.items(), None]) if target.table else None
    if entry is not None and rng.random() < 0.7:
        (num_accepted, bonus), tokens = entry
        target.outcome(num_accepted, bonus, tokens[: rng.randint(0, len(tokens))])
        return
    draft = [rng.randrange(VOCAB_SIZE) for _ in range(rng.randint(0, 3))]
    target.outcome(rng.randint(0, len(target.in_flight)), rng.randrange(VOCAB_SIZE), draft, backup=True)
