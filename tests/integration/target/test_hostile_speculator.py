"""A speculator that sends extreme values in every number of every message: no text changes, and nothing fails."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import Any

import grpc.aio
import pytest

from specpool.v1 import speculator_pb2, speculator_pb2_grpc, types_pb2
from specpool_engine.modeling.tokenizer import tokenizer_fingerprint
from specpool_engine.modeling.toy import ToyTokenizer

if "extreme_values" not in sys.modules:
    _spec = importlib.util.spec_from_file_location(
        "extreme_values", Path(__file__).parents[2] / "tools" / "extreme_values.py"
    )
    sys.modules["extreme_values"] = importlib.util.module_from_spec(_spec)
    _spec.loader.exec_module(sys.modules["extreme_values"])

from extreme_values import numeric_fields, put

VOCAB = 24
Response = speculator_pb2.SpeculateResponse
PER_ROUND = 20
"""Messages for each one of the target's."""


def base(kind: str, sequence_id: str, round_: int, draft_tokens: list[int]) -> Response:
    """A message that is about a sequence's running round."""
    if kind == "tables":
        entry = speculator_pb2.TableEntry(num_accepted=0, bonus_token=1, draft_tokens=[2, 3])
        table = speculator_pb2.Table(sequence_id=sequence_id, round=round_, entries=[entry])
        return Response(tables=speculator_pb2.Tables(tables=[table]))
    if kind == "draft_distributions":
        rows = [speculator_pb2.SparseDistribution(token_ids=[t, 5], probabilities=[0.5, 0.5]) for t in draft_tokens]
        message = speculator_pb2.DraftDistributions(
            sequence_id=sequence_id, round=round_, draft_tokens=draft_tokens, distributions=rows
        )
        return Response(draft_distributions=message)
    response = Response()
    message = getattr(response, kind)
    message.SetInParent()
    for name, value in (("sequence_id", sequence_id), ("round", max(0, round_ - 1))):
        if name in message.DESCRIPTOR.fields_by_name:
            setattr(message, name, value)
    return response


def cases(kind: str) -> list[tuple[tuple[str, ...], Any]]:
    return list(numeric_fields(getattr(base(kind, "s", 1, [1]), kind), (kind,)))


class HostileSpeculator(speculator_pb2_grpc.SpeculatorServiceServicer):
    """Throws the next cases for each outcome that it hears of."""

    def __init__(self, kind: str, thrown: list[tuple[tuple[str, ...], Any]], ack: Any = None) -> None:
        self.kind = kind
        self.left = list(thrown)
        self.ack = ack
        self.num_opened = 0

    async def start(self) -> str:
        self.server = grpc.aio.server()
        speculator_pb2_grpc.add_SpeculatorServiceServicer_to_server(self, self.server)
        port = self.server.add_insecure_port("127.0.0.1:0")
        await self.server.start()
        return f"127.0.0.1:{port}"

    async def GetSpeculatorStatus(self, request: Any, context: Any) -> Any:
        model = types_pb2.ModelInfo(tokenizer_fingerprint=tokenizer_fingerprint(ToyTokenizer(VOCAB)))
        return speculator_pb2.GetSpeculatorStatusResponse(
            state=types_pb2.SERVING_STATE_SERVING, model=model, row_budget=16, max_lookahead=4
        )

    async def Speculate(self, request_iterator: Any, context: Any) -> None:
        hello = (await context.read()).hello
        ack = Response(
            hello_ack=speculator_pb2.HelloAck(
                protocol_version=1,
                model=hello.model,
                transport=speculator_pb2.DISTRIBUTION_TRANSPORT_GRPC,
                max_lookahead=4,
                row_budget=16,
            )
        )
        if self.ack is not None:
            put(ack, *self.ack)
        await context.write(ack)
        while (request := await context.read()) is not grpc.aio.EOF:
            for sequence_id, round_, tokens in self._running(request):
                for path, value in self.left[:PER_ROUND]:
                    message = base(self.kind, sequence_id, round_, tokens)
                    put(message, path, value)
                    await context.write(message)
                del self.left[:PER_ROUND]

    def _running(self, request: Any) -> list[tuple[str, int, list[int]]]:
        kind = request.WhichOneof("message")
        if kind == "open_sequence":
            self.num_opened += 1
            message = request.open_sequence
            return [(message.sequence_id, message.round, list(message.draft_tokens))]
        if kind == "outcomes":
            return [(o.sequence_id, o.round + 1, list(o.draft_tokens)) for o in request.outcomes.outcomes]
        if kind in ("start_round", "speculate_now"):
            message = getattr(request, kind)
            round_ = message.round + (kind == "speculate_now")
            return [(message.sequence_id, round_, list(getattr(message, "draft_tokens", ())))]
        return []


async def run_until_all_is_thrown(target: Any, speculator: HostileSpeculator, **options: Any) -> None:
    address = await speculator.start()
    try:
        plain = await target.generate(mode="off", max_tokens=30)
        for _ in range(100):
            hostile = await target.generate(speculator=address, max_tokens=30, **options)
            assert len(hostile.tokens) == 30
            if "temperature" not in options:
                assert hostile.tokens == plain.tokens
            if not speculator.left and speculator.num_opened:
                break
        assert not speculator.left
        assert speculator.num_opened
        assert (await target.generate(mode="off", max_tokens=30)).tokens == plain.tokens
        assert (await target.status()).state == types_pb2.SERVING_STATE_SERVING
    finally:
        await speculator.server.stop(None)


@pytest.mark.parametrize("kind", ["tables", "resync", "load", "group_key", "group_closed"])
async def test_what_a_speculator_pushes(target_for, kind: str) -> None:
    await run_until_all_is_thrown(await target_for(), HostileSpeculator(kind, cases(kind)), mode="ssd")


async def test_what_it_answers(target_for) -> None:
    target = await target_for(speculation_deadline_ms=20.0)
    await run_until_all_is_thrown(target, HostileSpeculator("speculation", cases("speculation")), mode="sd")


async def test_distributions(target_for) -> None:
    speculator = HostileSpeculator("draft_distributions", cases("draft_distributions"))
    options = {"mode": "ssd", "verification": "rejection", "temperature": 0.8}
    await run_until_all_is_thrown(await target_for(distribution_deadline_ms=5.0), speculator, **options)


async def test_refusals_and_acknowledgements(target_for) -> None:
    """Each by a speculator of its own: it is not asked again soon."""
    target = await target_for(connect_deadline_ms=2000.0)
    for case in cases("sequence_refused"):
        await run_until_all_is_thrown(target, HostileSpeculator("sequence_refused", [case]), mode="ssd")
    for path, value in cases("hello_ack"):
        speculator = HostileSpeculator("load", [], ack=(path, value))
        address = await speculator.start()
        plain = await target.generate(mode="off", max_tokens=30)
        assert (await target.generate(mode="ssd", speculator=address, max_tokens=30)).tokens == plain.tokens
        await speculator.server.stop(None)
