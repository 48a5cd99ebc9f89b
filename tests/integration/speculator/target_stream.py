"""One target's stream to a speculator, spoken by a test."""

from __future__ import annotations

import asyncio
from typing import Any

import grpc
import grpc.aio

from specpool.v1 import speculator_pb2, types_pb2
from specpool_engine.modeling.tokenizer import load_tokenizer, tokenizer_fingerprint

MODEL = "toy#vocab=32,seed=1"
PROMPT = list(range(1, 20))
TIMEOUT_S = 10.0


class Stream:
    """One target's stream."""

    def __init__(self, stub: Any) -> None:
        self.call = stub.Speculate()
        self.tables: dict[tuple[str, int], dict[tuple[int, int], list[int]]] = {}
        self.others: list[Any] = []

    async def hello(self, **changes: Any) -> Any:
        fingerprint = tokenizer_fingerprint(load_tokenizer(MODEL))
        fields = {"protocol_version": 1, "vocab_size": 32, "fingerprint": fingerprint, "transports": ()} | changes
        model = types_pb2.ModelInfo(
            name="big", vocab_size=fields["vocab_size"], tokenizer_fingerprint=fields["fingerprint"]
        )
        hello = speculator_pb2.Hello(
            protocol_version=fields["protocol_version"],
            target=types_pb2.Peer(id="target"),
            model=model,
            transports=fields["transports"],
            max_lookahead=3,
        )
        await self.send(hello=hello)
        return (await self._read()).hello_ack

    async def send(self, **message: Any) -> None:
        await self.call.write(speculator_pb2.SpeculateRequest(**message))

    async def open(self, name: str = "s", mode: Any = types_pb2.SPECULATION_MODE_SSD, prompt: Any = PROMPT) -> None:
        await self.send(
            open_sequence=speculator_pb2.OpenSequence(
                sequence_id=name, token_ids=prompt, num_prompt_tokens=len(prompt), mode=mode, max_lookahead=3
            )
        )

    async def outcome(self, round_: int, num_accepted: int, bonus: int, tokens: Any = (), *, awaits=False) -> None:
        outcome = speculator_pb2.Outcome(
            sequence_id="s",
            round=round_,
            num_accepted=num_accepted,
            bonus_token=bonus,
            draft_tokens=tokens,
            draft_source=speculator_pb2.DRAFT_SOURCE_SPECULATOR,
            awaits_speculation=awaits,
        )
        await self.send(outcomes=speculator_pb2.Outcomes(outcomes=[outcome]))

    async def full_entry(self, round_: int, name: str = "s") -> tuple[tuple[int, int], list[int]]:
        """The first entry of a round with three tokens."""
        while True:
            for outcome, tokens in self.tables.get((name, round_), {}).items():
                if len(tokens) == 3:
                    return outcome, tokens
            await self.receive()

    async def some_entry(self, name: str) -> None:
        """Any entry of the first round."""
        async with asyncio.timeout(6 * TIMEOUT_S):
            while not self.tables.get((name, 0)):
                await self.receive()

    async def other(self, kind: str) -> Any:
        """The next message of a kind other than tables and load."""
        while True:
            for message in self.others:
                if message.WhichOneof("message") == kind:
                    self.others.remove(message)
                    return getattr(message, kind)
            await self.receive()

    async def receive(self) -> None:
        message = await self._read()
        if not message.HasField("tables"):
            self.others.append(message)
        for table in message.tables.tables:
            known = self.tables.setdefault((table.sequence_id, table.round), {})
            for entry in table.entries:
                known[entry.num_accepted, entry.bonus_token] = list(entry.draft_tokens)

    async def _read(self) -> Any:
        message = await asyncio.wait_for(self.call.read(), TIMEOUT_S)
        assert message is not grpc.aio.EOF, "the speculator ended the stream"
        return message
