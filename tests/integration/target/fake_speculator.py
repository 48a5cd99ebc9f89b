"""A scripted speculator on a real gRPC server, for tests of targets."""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass, field

import grpc.aio

from specpool.v1 import speculator_pb2, speculator_pb2_grpc, types_pb2
from specpool_engine.modeling.tokenizer import tokenizer_fingerprint
from specpool_engine.modeling.toy import ToyTokenizer

VOCAB = 24
LOOKAHEAD = 4
Response = speculator_pb2.SpeculateResponse


@dataclass
class KnownSequence:
    """What a speculator knows of a sequence."""

    tokens: list[int]
    num_prompt: int
    round: int
    draft: list[int] = field(default_factory=list)


@dataclass
class Script:
    """How a `FakeSpeculator` behaves. `truth` maps a prompt to the target's whole output."""

    truth: dict[tuple[int, ...], list[int]] = field(default_factory=dict)
    tables: str = "right"
    """right, partial, wrong, random or none."""
    replies: str = "right"
    """right, wrong, empty, late or none."""
    distributions: str = "none"
    """point (all probability on the drafted token), broken, or none."""
    reply_delay_s: float = 0.0
    die_after: int | None = None
    """Abort the stream at this outcome."""
    resync_at: int | None = None
    fingerprint: str = tokenizer_fingerprint(ToyTokenizer(VOCAB))
    protocol_version: int = 1
    step_ms: float = 1.0
    refuse: grpc.StatusCode | None = None


class FakeSpeculator(speculator_pb2_grpc.SpeculatorServiceServicer):
    """Speaks the protocol with scripted content, and checks what the target says against what it was told before."""

    def __init__(self, script: Script) -> None:
        self.script = script
        self.endpoint = ""
        self.seen: Counter[str] = Counter()
        self.live: dict[str, KnownSequence] = {}
        self.violations: list[str] = []
        self.opened: list[speculator_pb2.OpenSequence] = []
        self._server: grpc.aio.Server | None = None
        self._random = random.Random(5)

    async def start(self, port: int = 0) -> None:
        self._server = grpc.aio.server(options=[("grpc.so_reuseport", 0)])
        speculator_pb2_grpc.add_SpeculatorServiceServicer_to_server(self, self._server)
        bound = self._server.add_insecure_port(f"127.0.0.1:{port}")
        self.endpoint = f"127.0.0.1:{bound}"
        await self._server.start()

    async def kill(self) -> None:
        assert self._server is not None
        await self._server.stop(None)

    async def Speculate(self, request_iterator, context):
        hello = await context.read()
        assert hello.WhichOneof("message") == "hello"
        if self.script.refuse is not None:
            await context.abort(self.script.refuse, "refused by the script")
        await context.write(Response(hello_ack=self._ack()))
        await context.write(Response(load=self._load()))
        self.live.clear()
        replies: set[asyncio.Task] = set()
        while (request := await context.read()) is not grpc.aio.EOF:
            kind = request.WhichOneof("message")
            self.seen[kind] += 1
            for response in self._handle(kind, getattr(request, kind)):
                if response is None:
                    await context.abort(grpc.StatusCode.UNAVAILABLE, "killed by the script")
                if response.WhichOneof("message") == "speculation" and self.script.reply_delay_s:
                    replies.add(asyncio.create_task(self._later(context, response)))
                else:
                    await context.write(response)
        self.seen["half_close"] += 1
        for task in replies:
            task.cancel()

    async def _later(self, context, response):
        await asyncio.sleep(self.script.reply_delay_s)
        with suppress(asyncio.InvalidStateError, grpc.aio.UsageError, grpc.aio.InternalError):
            await context.write(response)

    def _ack(self):
        return speculator_pb2.HelloAck(
            protocol_version=self.script.protocol_version,
            speculator=types_pb2.Peer(id="fake", incarnation=1),
            model=types_pb2.ModelInfo(name="fake", tokenizer_fingerprint=self.script.fingerprint),
            transport=speculator_pb2.DISTRIBUTION_TRANSPORT_GRPC,
            max_lookahead=LOOKAHEAD,
        )

    def _load(self):
        return speculator_pb2.LoadReport(load=types_pb2.Load(step_ms=self.script.step_ms))

    def _handle(self, kind, message):
        if kind == "open_sequence":
            self.opened.append(message)
            known = KnownSequence(
                list(message.token_ids), message.num_prompt_tokens, message.round, list(message.draft_tokens)
            )
            self.live[message.sequence_id] = known
            return [*self._speculate(message.sequence_id, known)]
        if kind == "outcomes":
            return [r for outcome in message.outcomes for r in self._outcome(outcome)]
        if kind == "speculate_now":
            return self._reply(message)
        if kind == "start_round":
            known = self._known(message.sequence_id, message.round, kind)
            if known is not None:
                known.draft = list(message.draft_tokens)
                return [*self._speculate(message.sequence_id, known)]
        if kind == "close_sequence":
            self.live.pop(message.sequence_id, None)
        return []

    def _known(self, sequence_id, round_, kind):
        known = self.live.get(sequence_id)
        if known is not None and known.round != round_:
            self.violations.append(f"{kind} of round {round_}, expected {known.round}")
        return known

    def _outcome(self, outcome):
        if self.script.die_after is not None and self.seen["outcomes"] >= self.script.die_after:
            self.script.die_after = None
            return [None]
        known = self._known(outcome.sequence_id, outcome.round, "outcome")
        if known is None:
            return []
        if outcome.num_accepted > len(known.draft):
            self.violations.append(f"{outcome.num_accepted} accepted of {known.draft}")
        known.tokens += [*known.draft[: outcome.num_accepted], outcome.bonus_token]
        known.round += 1
        known.draft = list(outcome.draft_tokens)
        if self.script.resync_at == outcome.round:
            self.script.resync_at = None
            resync = speculator_pb2.Resync(sequence_id=outcome.sequence_id, reason="script")
            return [Response(resync=resync)]
        return [] if outcome.awaits_speculation else [*self._speculate(outcome.sequence_id, known)]

    def _future(self, known):
        """The target's own next tokens."""
        output = self.script.truth.get(tuple(known.tokens[: known.num_prompt]), [])
        done = known.tokens[known.num_prompt :]
        if output[: len(done)] != done:
            self.violations.append(f"committed {done}, the truth is {output}")
        return output[len(done) :]

    def _wrong(self, tokens):
        return [(t + 1) % VOCAB for t in tokens]

    def _speculate(self, sequence_id, known):
        yield from self._distributions(sequence_id, known)
        mode = self.script.tables
        entries = []
        if mode == "random":
            for _ in range(30):
                tokens = [self._random.choice([*range(VOCAB), 2**31]) for _ in range(self._random.randint(0, 9))]
                entries.append((self._random.randint(0, 5), self._random.randint(0, VOCAB - 1), tokens))
        elif mode != "none":
            future = self._future(known)
            accepted = 0
            while accepted < min(len(known.draft), len(future)) and known.draft[accepted] == future[accepted]:
                accepted += 1
            if accepted < len(future):
                following = future[accepted + 1 : accepted + 1 + LOOKAHEAD]
                following = following[:1] if mode == "partial" else following
                following = self._wrong(following) if mode == "wrong" else following
                entries = [(accepted, (future[accepted] + 5) % VOCAB, []), (accepted, future[accepted], following)]
        if entries:
            table = speculator_pb2.Table(
                sequence_id=sequence_id,
                round=known.round,
                entries=[
                    speculator_pb2.TableEntry(num_accepted=k, bonus_token=t, draft_tokens=d) for k, t, d in entries
                ],
            )
            yield Response(tables=speculator_pb2.Tables(tables=[table]))

    def _distributions(self, sequence_id, known):
        if self.script.distributions == "none" or not known.draft:
            return
        broken = self.script.distributions == "broken"
        rows = [
            speculator_pb2.SparseDistribution(token_ids=[token], probabilities=[float("nan") if broken else 1.0])
            for token in known.draft
        ]
        yield Response(
            draft_distributions=speculator_pb2.DraftDistributions(
                sequence_id=sequence_id, round=known.round, draft_tokens=known.draft, distributions=rows
            )
        )

    def _reply(self, message):
        known, mode = self._known(message.sequence_id, message.round + 1, "speculate_now"), self.script.replies
        if known is None or mode == "none":
            return []
        tokens = self._future(known)[: message.num_tokens] if mode != "empty" else []
        tokens = self._wrong(tokens) if mode == "wrong" else tokens
        reply = speculator_pb2.Speculation(sequence_id=message.sequence_id, round=message.round, draft_tokens=tokens)
        return [Response(speculation=reply)]
