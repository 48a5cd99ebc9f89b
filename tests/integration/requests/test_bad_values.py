"""Bad values in every field of a request: refused by name as an invalid argument, or served; nothing else."""

from __future__ import annotations

import asyncio
import math
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any

import grpc
import grpc.aio
import pytest
from google.protobuf.descriptor import Descriptor, FieldDescriptor
from google.protobuf.message import Message

from specpool.rpc.errors import from_rpc_error
from specpool.v1 import inference_pb2, inference_pb2_grpc, target_pb2, target_pb2_grpc, types_pb2

FieldPath = tuple[FieldDescriptor, ...]
BAD: dict[int, list[Any]] = {
    FieldDescriptor.CPPTYPE_STRING: ["x" * 20_000, "🫨" * 5000, "two\nlines", "\x00", "\u202e", " ", "' OR 1"],
    FieldDescriptor.CPPTYPE_UINT32: [0, 1, 64, 2**31, 2**32 - 1],
    FieldDescriptor.CPPTYPE_INT64: [0, -1, 2**63 - 1, -(2**63)],
    FieldDescriptor.CPPTYPE_DOUBLE: [math.nan, math.inf, -math.inf, -1.0, 0.0, 5e-324, 1e300],
    FieldDescriptor.CPPTYPE_FLOAT: [math.nan, math.inf, -math.inf, -1.0, 0.0, 1e-45, 3e38],
    FieldDescriptor.CPPTYPE_BOOL: [True],
    FieldDescriptor.CPPTYPE_ENUM: [3, 99, 2**31 - 1, -1],
}
MANY = 20_000


def is_map(field: FieldDescriptor) -> bool:
    return field.message_type is not None and field.message_type.GetOptions().map_entry


def fields_of(descriptor: Descriptor, path: FieldPath = ()) -> Iterator[FieldPath]:
    for field in descriptor.fields:
        if field.message_type is None or is_map(field):
            yield (*path, field)
        else:
            yield from fields_of(field.message_type, (*path, field))


def bad_values(field: FieldDescriptor) -> list[Any]:
    """For a map: bad keys."""
    if is_map(field):
        return bad_values(field.message_type.fields_by_name["key"])
    return [b"x" * 20_000] if field.type == FieldDescriptor.TYPE_BYTES else BAD[field.cpp_type]


def _set(message: Any, field: FieldDescriptor, value: Any, number: int) -> None:
    if is_map(field):
        bad = BAD[field.message_type.fields_by_name["value"].cpp_type][0]
        keys = [value] if number == 1 else [type(value)(index) for index in range(number)]
        getattr(message, field.name).update(dict.fromkeys(keys, bad))
    elif field.is_repeated:
        getattr(message, field.name).extend([value] * number)
    else:
        setattr(message, field.name, value)


def with_value(base: Message, path: FieldPath, value: Any, number: int = 1) -> Any:
    message: Any = type(base)()
    message.CopyFrom(base)
    parts = [message]
    for field in path[:-1]:
        part = getattr(parts[-1], field.name)
        parts.append(part.add() if field.is_repeated else part)
    _set(parts[-1], path[-1], value, number)
    return message


def with_many(base: Message, path: FieldPath) -> Any:
    """As many elements of the outermost list on the path as no request needs."""
    index = next(i for i, field in enumerate(path) if field.is_repeated)
    if index == len(path) - 1:
        bad = bad_values(path[-1])[1]
        return with_value(base, path, "x" if isinstance(bad, str) else bad, MANY)
    message: Any = type(base)()
    message.CopyFrom(base)
    part = message
    for field in path[:index]:
        part = getattr(part, field.name)
    elements = getattr(part, path[index].name)
    for _ in range(MANY):
        elements.add()
    return message


def cases(descriptor: Descriptor, base: Message) -> Iterator[tuple[str, Message]]:
    for path in fields_of(descriptor):
        name = ".".join(field.name for field in path)
        for value in bad_values(path[-1]):
            yield f"{name}={str(value)[:20]!r}", with_value(base, path, value)
        if any(field.is_repeated for field in path):
            yield f"{name} x {MANY}", with_many(base, path)


async def refusals(call: Callable[[Any], Any], requests: Iterator[tuple[str, Message]]) -> dict[str, str]:
    """What is refused, and how."""
    found = {}
    for name, request in requests:
        try:
            async with asyncio.timeout(60):
                async for _ in call(request):
                    pass
        except grpc.aio.AioRpcError as error:
            typed = from_rpc_error(error)
            found[name] = f"{error.code().name} {typed.reason}: {typed.message[:100]} {sorted(typed.metadata)}"
    return found


def generate_request(**fields: Any) -> inference_pb2.GenerateRequest:
    sampling = types_pb2.SamplingParams(max_tokens=3, seed=1)
    return inference_pb2.GenerateRequest(**{"text": "hello", "sampling": sampling, **fields})


def check(found: dict[str, str]) -> None:
    for name, how in found.items():
        # A model of another name could be served: that it is not is another thing than a name that none can have.
        accepted = ("INVALID_ARGUMENT", "NOT_FOUND MODEL_NOT_FOUND") if "model=" in name else ("INVALID_ARGUMENT",)
        assert how.startswith(accepted), f"{name}: {how}"
        assert "'field'" in how, f"{name}: {how}"


MUST_BE_REFUSED = [
    *("request_id='xxx", "session_id='xxx", "model='xxx", "text='xxx", "chat.messages.role x", "tokens.token_ids x"),
    *("sampling.stop x", "sampling.stop_token_ids x", "sampling.logit_bias x", "sampling.temperature='nan'"),
    *("sampling.stop='xxx", "sampling.num_logprobs='64'", "mode='99'", "verification='99'", "max_lookahead='0'"),
]


async def test_every_field_of_a_clients_request(start_service: Any) -> None:
    service = await start_service()
    stub: Any = inference_pb2_grpc.InferenceServiceStub(service.router)
    base = generate_request()
    found = await refusals(stub.Generate, cases(base.DESCRIPTOR, base))
    check(found)
    for start in MUST_BE_REFUSED:
        assert any(name.startswith(start) for name in found), f"{start} was served"
    assert await refusals(stub.Generate, iter([("good", base)])) == {}


async def test_every_field_of_what_a_router_says(start_service: Any) -> None:
    service = await start_service()
    stub: Any = target_pb2_grpc.TargetServiceStub(service.target)
    base = target_pb2.RunSequenceRequest(request=generate_request(), tenant="t")
    found = await refusals(stub.RunSequence, cases(base.DESCRIPTOR, base))
    check(found)
    for start in ("tenant='xxx", "tenant_weight='nan'", "tenant_weight='inf'", "tenant_weight='-1.0'", "cache_salt="):
        assert any(name.startswith(start) for name in found), f"{start} was served"
    assert await refusals(stub.RunSequence, iter([("good", base)])) == {}


async def test_every_field_of_resume_and_cancel(start_service: Any) -> None:
    service = await start_service()
    stub: Any = inference_pb2_grpc.InferenceServiceStub(service.router)

    def resumed() -> Iterator[tuple[str, Message]]:
        base = inference_pb2.ResumeRequest(request_id="r", request=generate_request())
        for number, (name, message) in enumerate(cases(base.DESCRIPTOR, base)):
            assert isinstance(message, inference_pb2.ResumeRequest)
            if message.request_id == base.request_id:  # each finds that its session is lost
                message.request_id = f"r-{number}"
            yield name, message

    async def cancel(request: Any) -> AsyncIterator[Any]:
        yield await stub.Cancel(request)

    found = await refusals(stub.Resume, resumed())
    accepted = ("INVALID_ARGUMENT", "NOT_FOUND MODEL_NOT_FOUND", "NOT_FOUND SESSION_NOT_FOUND")
    accepted += ("FAILED_PRECONDITION RESUME_IMPOSSIBLE",)
    for name, how in found.items():
        assert how.startswith(accepted), f"{name}: {how}"
    assert found["request_id='xxxxxxxxxxxxxxxxxxxx'"].startswith("INVALID_ARGUMENT")
    check(await refusals(cancel, cases(inference_pb2.CancelRequest.DESCRIPTOR, inference_pb2.CancelRequest())))


@pytest.mark.parametrize(
    ("fields", "field", "accepted"),
    [
        ({"text": "x" * (64 * 5 + 1)}, "text", "at most 320"),
        ({"tokens": inference_pb2.TokenPrompt(token_ids=[1] * 65)}, "tokens.token_ids", "at most 64"),
        ({"session_id": "s" * 257}, "session_id", "at most 256 printable characters"),
        ({"model": "🫨" * 5000}, "model", "at most 256 printable characters"),
        ({"sampling": types_pb2.SamplingParams(stop=["x"] * 33)}, "stop", "at most 32 in number"),
        ({"sampling": types_pb2.SamplingParams(stop=["x" * 513])}, "stop", "strings of at most 512 characters"),
    ],
    ids=lambda value: str(value)[:20],
)
async def test_limits_name_field_value_and_what_is_accepted(
    start_service: Any, fields: dict[str, Any], field: str, accepted: str
) -> None:
    service = await start_service()
    stub: Any = inference_pb2_grpc.InferenceServiceStub(service.router)
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        async for _ in stub.Generate(generate_request(**fields)):
            pass
    error = from_rpc_error(caught.value)
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert (error.metadata["field"], error.metadata["accepted"]) == (field, accepted)
    assert error.metadata["value"]


async def test_max_tokens_beyond_the_context_is_a_ceiling(start_service: Any) -> None:
    service = await start_service()
    stub: Any = inference_pb2_grpc.InferenceServiceStub(service.router)
    sampling = types_pb2.SamplingParams(max_tokens=2**32 - 1, seed=1, ignore_eos=True)
    events = [event async for event in stub.Generate(generate_request(sampling=sampling))]
    assert events[-1].finished.finish_reason == types_pb2.FINISH_REASON_LENGTH
    assert events[-1].finished.usage.num_completion_tokens == 64 - len("hello")
