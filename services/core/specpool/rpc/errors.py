"""Errors on the wire: `SpecPoolError` to ``google.rpc.Status`` with rich details, and back to the same type.

Details sent: ``ErrorInfo`` (reason, domain "specpool", metadata) and, for an invalid argument that names its field,
``BadRequest`` with one field violation.
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import islice
from typing import Final

import grpc
import grpc.aio
from google.protobuf.message import DecodeError, Message
from google.rpc import error_details_pb2, status_pb2  # type: ignore[import-untyped]
from grpc_status import rpc_status

from specpool import errors
from specpool.errors import SpecPoolError

DOMAIN: Final = "specpool"
TOO_LARGE: Final = "REQUEST_TOO_LARGE"
_DETAILS_KEY: Final = "grpc-status-details-bin"
# Trailing metadata that outgrows the peer's header limit (8 KiB) turns any error into RESOURCE_EXHAUSTED. The message
# travels three times: percent-encoded, which triples what is not ASCII, and in two details, in base 64.
_MAX_MESSAGE_BYTES: Final = 800
_MAX_VALUE_BYTES: Final = 200
_MAX_WORD_BYTES: Final = 64
_MAX_VALUES: Final = 8
_TOO_LARGE: Final = "larger than max"
"""What gRPC says of a message above a limit of the channel or the server."""

_KIND_BY_CODE: Final[Mapping[grpc.StatusCode, type[SpecPoolError]]] = {
    grpc.StatusCode.DEADLINE_EXCEEDED: errors.DeadlineExceeded,
    grpc.StatusCode.INVALID_ARGUMENT: errors.InvalidArgument,
    grpc.StatusCode.OUT_OF_RANGE: errors.InvalidArgument,
    grpc.StatusCode.UNAUTHENTICATED: errors.Unauthenticated,
    grpc.StatusCode.PERMISSION_DENIED: errors.PermissionDenied,
    grpc.StatusCode.RESOURCE_EXHAUSTED: errors.QuotaExceeded,
    grpc.StatusCode.FAILED_PRECONDITION: errors.ProtocolMismatch,
    grpc.StatusCode.UNIMPLEMENTED: errors.ProtocolMismatch,
    grpc.StatusCode.NOT_FOUND: errors.SessionNotFound,
    grpc.StatusCode.INTERNAL: errors.Internal,
}

_CODES: Final = {code.value[0]: code for code in grpc.StatusCode if code is not grpc.StatusCode.OK}

# A caller's own cancellation is no failed call: a bare CANCELLED comes from the peer.
_GONE: Final = (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED)


def to_status(error: SpecPoolError) -> status_pb2.Status:
    """The ``google.rpc.Status`` that carries ``error``."""
    code = grpc.StatusCode[error.status_code_name]
    status = status_pb2.Status(code=code.value[0], message=_shorten(error.message, _MAX_MESSAGE_BYTES))
    metadata = {
        _shorten(key, _MAX_WORD_BYTES): _shorten(value, _MAX_VALUE_BYTES)
        for key, value in islice(error.metadata.items(), _MAX_VALUES)
    }
    reason = _shorten(error.reason, _MAX_WORD_BYTES)
    _pack(status, error_details_pb2.ErrorInfo(reason=reason, domain=DOMAIN, metadata=metadata))
    if isinstance(error, errors.InvalidArgument) and "field" in metadata:
        violation = error_details_pb2.BadRequest.FieldViolation(field=metadata["field"], description=status.message)
        _pack(status, error_details_pb2.BadRequest(field_violations=[violation]))
    return status


def rpc_error_of(status: bytes) -> grpc.aio.AioRpcError:
    """The failure of a call that ended with this encoded ``google.rpc.Status``: for one request of a shared stream.

    One that is not readable is INTERNAL, without details, as a broken call is.
    """
    try:
        decoded = status_pb2.Status.FromString(status)
        code = _CODES[decoded.code]
    except (DecodeError, KeyError):
        return grpc.aio.AioRpcError(grpc.StatusCode.INTERNAL, grpc.aio.Metadata(), grpc.aio.Metadata(), "no status")
    trailing = grpc.aio.Metadata((_DETAILS_KEY, status))
    return grpc.aio.AioRpcError(code, grpc.aio.Metadata(), trailing, decoded.message)


async def abort(context: grpc.aio.ServicerContext[object, object], error: SpecPoolError) -> None:
    """End the call with the status of ``error``. Always raises (`grpc.aio.AbortError`)."""
    await context.abort_with_status(rpc_status.to_status(to_status(error)))


def from_rpc_error(
    error: grpc.aio.AioRpcError, *, unavailable: type[SpecPoolError] = errors.TargetUnavailable
) -> SpecPoolError:
    """The typed error behind a failed call, rebuilt from its ErrorInfo; without one, chosen by the status code.

    Args:
        error: of the failed call.
        unavailable: what a peer that cannot be reached is called here.
    """
    code = error.code()
    info = _error_info(error)
    message = error.details() or code.name
    by_code = unavailable if code in _GONE else _KIND_BY_CODE.get(code, errors.Internal)
    if info is None and code is grpc.StatusCode.RESOURCE_EXHAUSTED and _TOO_LARGE in message:
        return errors.InvalidArgument(message, reason=TOO_LARGE)
    if info is None and code is grpc.StatusCode.CANCELLED:
        return by_code("the peer ended the call without a reason, as one does that stops; it may be tried again")
    if info is None:
        return by_code(message, reason=_reason_of_bare_status(code, by_code))
    typed = errors.error_from_reason(info.reason, message, info.metadata)
    # A reason of its own ("EMPTY_PROMPT") names no class: keep the reason, and the status it came with.
    return typed if type(typed) is not SpecPoolError else by_code(message, reason=info.reason, metadata=info.metadata)


def has_details(error: grpc.aio.AioRpcError) -> bool:
    """Whether somebody answered: a status without details is gRPC's own word for a call that it could not finish."""
    return any(key == _DETAILS_KEY for key, _ in error.trailing_metadata() or ())


def _reason_of_bare_status(code: grpc.StatusCode, kind: type[SpecPoolError]) -> str:
    """The reason for a bare status: a code that gRPC itself sends must not read as one of ours where that misleads."""
    own = {grpc.StatusCode.RESOURCE_EXHAUSTED, grpc.StatusCode.NOT_FOUND, grpc.StatusCode.FAILED_PRECONDITION}
    return code.name if code in own else kind.default_reason


def _error_info(error: grpc.aio.AioRpcError) -> error_details_pb2.ErrorInfo | None:
    for key, value in error.trailing_metadata() or ():
        if key == _DETAILS_KEY and isinstance(value, bytes):
            return _decode_error_info(value)
    return None


def _decode_error_info(encoded: bytes) -> error_details_pb2.ErrorInfo | None:
    info = error_details_pb2.ErrorInfo()
    try:
        for detail in status_pb2.Status.FromString(encoded).details:
            if detail.Is(error_details_pb2.ErrorInfo.DESCRIPTOR) and detail.Unpack(info) and info.domain == DOMAIN:
                return info
    except DecodeError:  # a proxy's, not ours
        return None
    return None


def _pack(status: status_pb2.Status, detail: Message) -> None:
    status.details.add().Pack(detail)


def _shorten(text: str, max_bytes: int) -> str:
    """The beginning of `text` that fits into `max_bytes` of valid UTF-8."""
    encoded = text.encode(errors="replace")
    if len(encoded) <= max_bytes:
        return encoded.decode()
    return encoded[: max_bytes - 3].decode(errors="ignore") + "..."
