"""What a failed call becomes when it did not come with our details."""

from __future__ import annotations

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
        (grpc.StatusCode.CANCELLED, errors.Cancelled),
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


def test_details_stay_small() -> None:
    error = errors.InvalidArgument("x" * 100_000, metadata={"field": "prompt", "value": "y" * 100_000})
    assert to_status(error).ByteSize() < 8000
