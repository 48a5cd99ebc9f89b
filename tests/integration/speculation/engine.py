"""An engine that is no target of ours, on threads of its own, and speculators to script on a real gRPC server."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

import grpc.aio

from specpool.algorithm.speculation_cache import LookupKind
from specpool.discovery.discovery import Discovery, Endpoint
from specpool.speculation import DraftSource, SpeculationPool
from specpool.v1 import speculator_pb2, speculator_pb2_grpc, types_pb2

VOCAB = 31
LOOKAHEAD = 4
FINGERPRINT = "f" * 64
FAST = {"review_interval_s": 0.05, "status_interval_s": 0.2, "urgent_status_interval_s": 0.05}
"""Settings of a pool that looks often."""
GREEDY = types_pb2.SamplingParams(temperature=0)
Response = speculator_pb2.SpeculateResponse


def after(token: int) -> int:
    """The model: the token that follows this one."""
    return (5 * token + 3) % VOCAB


def output(prompt: list[int], num_tokens: int) -> list[int]:
    """Plain decoding."""
    tokens = [after(prompt[-1])]
    while len(tokens) < num_tokens:
        tokens.append(after(tokens[-1]))
    return tokens[:num_tokens]


@dataclass
class Known:
    """What a speculator was told of a sequence."""

    tokens: list[int]
    round: int
    draft: list[int]


class ScriptedSpeculator(speculator_pb2_grpc.SpeculatorServiceServicer):
    """Drafts rightly, unless it is told otherwise; checks what it is told against what it was told before."""

    def __init__(self) -> None:
        self.address = ""
        self.seen: Counter[str] = Counter()
        self.live: dict[str, Known] = {}
        self.violations: list[str] = []
        self.opened_at_s: dict[str, list[float]] = {}
        self.refuses: speculator_pb2.SequenceRefused | None = None
        self.max_sequences = 0
        self.max_context = self.num_asked = 0
        self.is_silent = False
        self.answers = True
        self.guesses = True
        self.state = types_pb2.SERVING_STATE_SERVING
        self.fingerprint = FINGERPRINT
        self._streams: dict[Any, asyncio.Lock] = {}
        self._server: Any = None

    async def start(self, port: int = 0) -> None:
        self._server = grpc.aio.server(options=[("grpc.so_reuseport", 0)])
        speculator_pb2_grpc.add_SpeculatorServiceServicer_to_server(self, self._server)
        self.address = f"127.0.0.1:{self._server.add_insecure_port(f'127.0.0.1:{port}')}"
        await self._server.start()

    async def kill(self) -> None:
        await self._server.stop(None)

    async def say(self, **message: Any) -> None:
        for stream in list(self._streams):
            await self._write(stream, Response(**message))

    async def _write(self, stream: Any, response: Response) -> None:
        async with self._streams[stream]:  # gRPC takes one write at a time
            await stream.write(response)

    @property
    def num_streams(self) -> int:
        return len(self._streams)

    async def GetSpeculatorStatus(self, request: Any, context: Any) -> speculator_pb2.GetSpeculatorStatusResponse:
        self.num_asked += 1
        return speculator_pb2.GetSpeculatorStatusResponse(
            state=self.state,
            model=types_pb2.ModelInfo(tokenizer_fingerprint=self.fingerprint, max_context=self.max_context),
            load=types_pb2.Load(num_sequences_running=len(self.live)),
            row_budget=32,
            max_sequences=self.max_sequences,
        )

    async def Speculate(self, request_iterator: Any, context: Any) -> None:
        hello = await context.read()
        assert hello.WhichOneof("message") == "hello"
        ack = speculator_pb2.HelloAck(
            protocol_version=1,
            speculator=types_pb2.Peer(id=self.address),
            model=types_pb2.ModelInfo(tokenizer_fingerprint=self.fingerprint, max_context=self.max_context),
            transport=speculator_pb2.DISTRIBUTION_TRANSPORT_GRPC,
            max_lookahead=LOOKAHEAD,
            row_budget=32,
            max_sequences=self.max_sequences,
        )
        await context.write(Response(hello_ack=ack))
        self._streams[context] = asyncio.Lock()
        reporter = asyncio.create_task(self._report(context))
        opened: set[str] = set()
        try:
            while (request := await context.read()) is not grpc.aio.EOF:
                kind = request.WhichOneof("message")
                self.seen[kind] += 1
                for response in self._handle(kind, getattr(request, kind), opened):
                    await self._write(context, response)
            self.seen["half_close"] += 1
        finally:
            reporter.cancel()
            del self._streams[context]
            for name in opened:
                self.live.pop(name, None)

    async def _report(self, context: Any) -> None:
        while True:
            load = types_pb2.Load(num_sequences_running=len(self.live), step_ms=1)
            with suppress(Exception):
                await self._write(context, Response(load=speculator_pb2.LoadReport(load=load)))
            await asyncio.sleep(0.1)

    def _handle(self, kind: str, message: Any, opened: set[str]) -> Iterator[Response]:
        if kind == "open_sequence":
            self.opened_at_s.setdefault(message.sequence_id, []).append(time.monotonic())
            if self.refuses is not None:
                refusal = speculator_pb2.SequenceRefused()
                refusal.CopyFrom(self.refuses)
                refusal.sequence_id = message.sequence_id
                yield Response(sequence_refused=refusal)
                return
            if message.sequence_id in self.live:
                self.seen["opened again"] += 1
            known = Known(list(message.token_ids), message.round, list(message.draft_tokens))
            self.live[message.sequence_id] = known
            opened.add(message.sequence_id)
            yield from self._table(message.sequence_id, known)
        elif kind == "outcomes":
            for outcome in message.outcomes:
                known = self._known(outcome.sequence_id, outcome.round, kind)
                if known is not None:
                    if outcome.num_accepted > len(known.draft):
                        self.violations.append(f"{outcome.num_accepted} accepted of {known.draft}")
                    committed = [*known.draft[: outcome.num_accepted], outcome.bonus_token]
                    if committed != output(known.tokens, len(committed)):
                        self.violations.append(f"{committed} after {known.tokens[-1]} are not the model's")
                    known.tokens += committed
                    known.round, known.draft = known.round + 1, list(outcome.draft_tokens)
                    if not outcome.awaits_speculation:
                        yield from self._table(outcome.sequence_id, known)
        elif kind == "speculate_now":
            known = self._known(message.sequence_id, message.round + 1, kind)
            if known is not None and self.answers and not self.is_silent:
                tokens = output(known.tokens, message.num_tokens)
                reply = {"sequence_id": message.sequence_id, "round": message.round, "draft_tokens": tokens}
                yield Response(speculation=speculator_pb2.Speculation(**reply))
        elif kind == "start_round":
            known = self._known(message.sequence_id, message.round, kind)
            if known is not None:
                known.draft = list(message.draft_tokens)
                yield from self._table(message.sequence_id, known)
        elif kind == "close_sequence":
            self.live.pop(message.sequence_id, None)

    def _known(self, sequence_id: str, round_: int, kind: str) -> Known | None:
        known = self.live.get(sequence_id)
        if known is not None and known.round != round_:
            self.violations.append(f"{kind} of round {round_}, expected {known.round}")
        return known

    def _table(self, sequence_id: str, known: Known) -> Iterator[Response]:
        if self.is_silent or not self.guesses:
            return
        future = output(known.tokens, len(known.draft) + 1 + LOOKAHEAD)
        accepted = next((i for i, t in enumerate(known.draft) if t != future[i]), len(known.draft))
        entry = speculator_pb2.TableEntry(
            num_accepted=accepted,
            bonus_token=future[accepted],
            draft_tokens=future[accepted + 1 : accepted + 1 + LOOKAHEAD],
        )
        table = speculator_pb2.Table(sequence_id=sequence_id, round=known.round, entries=[entry])
        yield Response(tables=speculator_pb2.Tables(tables=[table]))


class Named(Discovery):
    """A directory that a test writes."""

    def __init__(self, endpoints: Iterable[Endpoint] = ()) -> None:
        super().__init__()
        self._first = tuple(endpoints)
        self._loop: asyncio.AbstractEventLoop | None = None

    async def start(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._publish(self._first)

    async def close(self) -> None:
        pass

    def name(self, *endpoints: Endpoint | str) -> None:
        """From any thread."""
        found = [Endpoint(e) if isinstance(e, str) else e for e in endpoints]
        if self._loop is None:
            self._first = tuple(found)
        else:
            self._loop.call_soon_threadsafe(self._publish, found)


@dataclass
class Engine:
    """Decodes on the thread that calls `run`; a round takes `round_s`."""

    pool: SpeculationPool
    round_s: float = 0.01
    waits_s: float = 0.0
    """Longest wait for a just-in-time draft after a miss."""
    rounds: dict[str, list[tuple[float, LookupKind | None]]] = field(default_factory=dict)
    """When each round of a sequence ended, and what was found for the next."""
    stop: bool = False

    def run(self, prompt: list[int], num_tokens: int, name: str = "") -> list[int]:
        """The output; raises unless it is the model's."""
        handle = self.pool.open(prompt, GREEDY, sequence_id=name, max_lookahead=LOOKAHEAD)
        rounds = self.rounds.setdefault(handle.id, [])
        tokens, draft = list(prompt), []
        try:
            while len(tokens) - len(prompt) < num_tokens and not self.stop:
                time.sleep(self.round_s)
                truth = output(tokens, len(draft) + 1)
                accepted = next((i for i, t in enumerate(draft) if t != truth[i]), len(draft))
                tokens += truth[: accepted + 1]
                found = handle.next(accepted, truth[accepted])
                rounds.append((time.monotonic(), found.kind))
                draft = list(found.tokens)
                if not draft and self.waits_s and handle.request(LOOKAHEAD, self.waits_s):
                    draft = list(handle.wait(self.waits_s))
                handle.started(draft, DraftSource.SPECULATOR if draft else DraftSource.NONE)
        finally:
            handle.close()
        done = tokens[len(prompt) :]
        assert done == output(prompt, len(done))
        return done

    def hit_rate(self, name: str, *, after_s: float = 0.0, before_s: float = float("inf")) -> float:
        """Share of the rounds in a time that found all they could use."""
        kinds = [kind for at_s, kind in self.rounds[name] if after_s <= at_s < before_s]
        return sum(kind is LookupKind.HIT for kind in kinds) / max(1, len(kinds))

    async def until(self, name: str, condition: Callable[[list[LookupKind | None]], bool]) -> float:
        """When the rounds of a sequence were such."""
        async with asyncio.timeout(30):
            while not condition([kind for _, kind in self.rounds.get(name, [])]):
                await asyncio.sleep(0.002)
        return time.monotonic()

    async def until_hits(self, name: str, num_hits: int = 5) -> float:
        """When so many further hits were there."""
        num_before = len(self.rounds.get(name, []))
        return await self.until(name, lambda kinds: kinds[num_before:].count(LookupKind.HIT) >= num_hits)


async def eventually(condition: Callable[[], bool], timeout_s: float = 30.0) -> None:
    """Until it holds."""
    async with asyncio.timeout(timeout_s):
        while not condition():
            await asyncio.sleep(0.005)


@asynccontextmanager
async def running(engine: Engine, *names: str, num_prompt_tokens: int = 1) -> AsyncIterator[None]:
    """Sequences that run until the end of the block."""
    loop = asyncio.get_running_loop()
    with ThreadPoolExecutor(len(names)) as threads:
        prompts = [[7 + i] * num_prompt_tokens for i in range(len(names))]
        runs = [
            loop.run_in_executor(threads, engine.run, prompt, 10**9, name)
            for prompt, name in zip(prompts, names, strict=True)
        ]
        try:
            yield
        finally:
            engine.stop = True
            outputs = await asyncio.gather(*runs)
    assert all(outputs)
