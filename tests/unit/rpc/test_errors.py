"""What a failed call becomes when it did not come with our details."""

from __future__ import annotations

import base64
import string
from urllib.parse import quote

import grpc
import grpc.aio
import pytest
from google.rpc import error_details_pb2, status_pb2

from specpool import errors
from specpool.rpc.errors import from_rpc_error, to_status


def _failed(code: grpc.StatusCode, *metadata: tuple[str, str | bytes]) -> grpc.aio.AioRpcError:
    return grpc.aio.AioRpcError(code, grpc.aio.Metadata(), grpc.aio.Metadata(*metadata), details="why")


@pytest.mark.parametrize(
    ("code", "kind"),
    [
        (grpc.StatusCode.UNAVAILABLE, errors.SpeculatorUnavailable),
        (grpc.StatusCode.DEADLINE_EXCEEDED, errors.DeadlineExceeded),
        (grpc.StatusCode.RESOURCE_EXHAUSTED, errors.QuotaExceeded),
        (grpc.StatusCode.UNIMPLEMENTED, errors.ProtocolMismatch),
        (grpc.StatusCode.UNKNOWN, errors.Internal),
    ],
)
def test_bare_status(code: grpc.StatusCode, kind: type[errors.SpecPoolError]) -> None:
    error = from_rpc_error(_failed(code), unavailable=errors.SpeculatorUnavailable)
    assert type(error) is kind
    assert str(error) == "why"


def test_undecodable_and_foreign_details_are_ignored() -> None:
    foreign = status_pb2.Status(code=14)
    foreign.details.add().Pack(error_details_pb2.ErrorInfo(reason="QUOTA_EXCEEDED", domain="proxy"))
    for encoded in (b"\xff\xff", foreign.SerializeToString()):
        error = from_rpc_error(_failed(grpc.StatusCode.UNAVAILABLE, ("grpc-status-details-bin", encoded)))
        assert type(error) is errors.TargetUnavailable


def test_a_bare_cancellation_is_a_peer_that_went_away() -> None:
    error = from_rpc_error(_failed(grpc.StatusCode.CANCELLED))
    assert type(error) is errors.TargetUnavailable
    assert "without a reason" in error.message


def test_a_message_that_grpc_refuses_is_too_large() -> None:
    code = grpc.StatusCode.RESOURCE_EXHAUSTED
    details = "SERVER: Received message larger than max (31457185 vs. 16777216)"
    refused = grpc.aio.AioRpcError(code, grpc.aio.Metadata(), grpc.aio.Metadata(), details=details)
    error = from_rpc_error(refused)
    assert (type(error), error.reason) == (errors.InvalidArgument, "REQUEST_TOO_LARGE")


@pytest.mark.parametrize("letter", ["x", "é", "\N{GRINNING FACE}", "\ud800"])
def test_details_stay_small(letter: str) -> None:
    many = {f"{letter * 100}{number}": letter * 100_000 for number in range(100)}
    error = errors.InvalidArgument(letter * 100_000, reason=letter * 999, metadata={"field": letter * 999} | many)
    status = to_status(error)
    num_details = len(base64.b64encode(status.SerializeToString()))
    num_message = len(quote(status.message, safe=string.printable))
    assert num_message + num_details < 8000
    assert status.message.endswith("...")
