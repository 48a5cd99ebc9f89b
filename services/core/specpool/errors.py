"""Every error that SpecPool shows to a user or to a peer.

One root, one class per kind, one table from class to gRPC status code name. Only the RPC interceptors apply
the table; everything else raises and catches the classes. This module imports neither torch nor gRPC.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import ClassVar, Final


class SpecPoolError(Exception):
    """Root of all SpecPool errors.

    ``reason`` is a stable UPPER_SNAKE word for programs, ``message`` a sentence for people, and
    ``metadata`` the values the message mentions, as strings (they travel in ``google.rpc.ErrorInfo``).
    """

    default_reason: ClassVar[str] = "INTERNAL"

    def __init__(
        self,
        message: str,
        *,
        reason: str | None = None,
        metadata: Mapping[str, object] | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.reason = reason or self.default_reason
        self.metadata: dict[str, str] = {key: str(value) for key, value in (metadata or {}).items()}

    def __str__(self) -> str:
        return self.message

    @property
    def status_code_name(self) -> str:
        """Name of the gRPC status code this error maps to."""
        return status_code_name(self)


class InvalidArgument(SpecPoolError):
    """A request or a call has a value that is never acceptable."""

    default_reason = "INVALID_ARGUMENT"


class ConfigError(InvalidArgument):
    """A setting (file, environment or flag) is unknown, malformed or contradicts another."""

    default_reason = "CONFIG_INVALID"


class ContextLengthExceeded(InvalidArgument):
    """Prompt plus requested tokens do not fit into the model's context."""

    default_reason = "CONTEXT_LENGTH_EXCEEDED"


class ModelNotFound(SpecPoolError):
    """No such model on disk, on the hub, or served here."""

    default_reason = "MODEL_NOT_FOUND"


class DataCorrupt(SpecPoolError):
    """Downloaded bytes are not what they must be (checksum)."""

    default_reason = "CHECKSUM_MISMATCH"


class SessionNotFound(SpecPoolError):
    """The session to cancel or resume is not known."""

    default_reason = "SESSION_NOT_FOUND"


class ResumeImpossible(SpecPoolError):
    """What would follow cannot be guaranteed to continue the answer that the client has."""

    default_reason = "RESUME_IMPOSSIBLE"


class KVCacheFull(SpecPoolError):
    """No free KV cache block is left."""

    default_reason = "KV_CACHE_FULL"


class QuotaExceeded(SpecPoolError):
    """The tenant used up a quota."""

    default_reason = "QUOTA_EXCEEDED"


class TokenizerMismatch(SpecPoolError):
    """Target and speculator do not share one tokenizer."""

    default_reason = "TOKENIZER_MISMATCH"


class ProtocolMismatch(SpecPoolError):
    """The peer speaks another protocol version, or breaks the protocol."""

    default_reason = "PROTOCOL_MISMATCH"


class SessionStoreUnavailable(SpecPoolError):
    """The session store (Redis or Valkey) cannot be reached."""

    default_reason = "SESSION_STORE_UNAVAILABLE"


class SessionStoreRefused(SessionStoreUnavailable):
    """The session store answers, but refuses this one operation; others may go well."""

    default_reason = "SESSION_STORE_REFUSED"


class SessionStoreMisconfigured(SessionStoreUnavailable):
    """What answers can never be the session store: another kind of server, or one that refuses the credentials."""

    default_reason = "SESSION_STORE_MISCONFIGURED"


class SpeculatorUnavailable(SpecPoolError):
    """The speculator cannot be reached or is lost."""

    default_reason = "SPECULATOR_UNAVAILABLE"


class TargetUnavailable(SpecPoolError):
    """No target can serve the request now."""

    default_reason = "TARGET_UNAVAILABLE"


class TransportUnavailable(SpecPoolError):
    """The transport that was asked for cannot be had (never silently replaced by another)."""

    default_reason = "TRANSPORT_UNAVAILABLE"


class Draining(SpecPoolError):
    """The server is shutting down and takes no new work."""

    default_reason = "DRAINING"


class Overloaded(SpecPoolError):
    """The server has as much to do as it takes; the same call may be accepted a moment later, or by another."""

    default_reason = "OVERLOADED"


class Unauthenticated(SpecPoolError):
    """Credentials are missing or invalid."""

    default_reason = "UNAUTHENTICATED"


class PermissionDenied(SpecPoolError):
    """The credentials are valid but do not allow this."""

    default_reason = "PERMISSION_DENIED"


class Cancelled(SpecPoolError):
    """The caller cancelled the request."""

    default_reason = "CANCELLED"


class DeadlineExceeded(SpecPoolError):
    """The deadline passed first."""

    default_reason = "DEADLINE_EXCEEDED"


class Internal(SpecPoolError):
    """A defect in SpecPool itself."""

    default_reason = "INTERNAL"


class RequestCostTargets(Internal):
    """The request was lost with every target that ran it, so it is not given to another."""

    default_reason = "REQUEST_COST_TARGETS"


class SequenceFailed(Internal):
    """An engine failed on this one sequence; it goes on with the others."""

    default_reason = "SEQUENCE_FAILED"


class EngineFailed(Internal):
    """An engine thread died; the process cannot serve until it restarts."""

    default_reason = "ENGINE_FAILED"


class EngineHung(EngineFailed):
    """An engine thread has not come back from what it does; the process ends, to be started anew."""

    default_reason = "ENGINE_HUNG"


class FollowerLost(EngineFailed):
    """A process that holds part of a model ended or stopped answering; the engine cannot go on without it."""

    default_reason = "FOLLOWER_LOST"


STATUS_CODE_NAMES: Final[Mapping[type[SpecPoolError], str]] = {
    SpecPoolError: "INTERNAL",
    InvalidArgument: "INVALID_ARGUMENT",
    ConfigError: "INVALID_ARGUMENT",
    ContextLengthExceeded: "INVALID_ARGUMENT",
    ModelNotFound: "NOT_FOUND",
    SessionNotFound: "NOT_FOUND",
    ResumeImpossible: "FAILED_PRECONDITION",
    DataCorrupt: "DATA_LOSS",
    KVCacheFull: "RESOURCE_EXHAUSTED",
    QuotaExceeded: "RESOURCE_EXHAUSTED",
    TokenizerMismatch: "FAILED_PRECONDITION",
    ProtocolMismatch: "FAILED_PRECONDITION",
    TransportUnavailable: "FAILED_PRECONDITION",
    SessionStoreUnavailable: "UNAVAILABLE",
    SessionStoreRefused: "UNAVAILABLE",
    SessionStoreMisconfigured: "UNAVAILABLE",
    SpeculatorUnavailable: "UNAVAILABLE",
    TargetUnavailable: "UNAVAILABLE",
    Draining: "UNAVAILABLE",
    Overloaded: "UNAVAILABLE",
    Unauthenticated: "UNAUTHENTICATED",
    PermissionDenied: "PERMISSION_DENIED",
    Cancelled: "CANCELLED",
    DeadlineExceeded: "DEADLINE_EXCEEDED",
    Internal: "INTERNAL",
    RequestCostTargets: "INTERNAL",
    SequenceFailed: "INTERNAL",
    EngineFailed: "INTERNAL",
    EngineHung: "INTERNAL",
    FollowerLost: "INTERNAL",
}
"""The one table from error to gRPC status code name (``grpc.StatusCode[name]``)."""


def status_code_name(error: BaseException) -> str:
    """Name of the gRPC status code for ``error``; what is not ours is INTERNAL."""
    for kind in type(error).__mro__:
        if kind in STATUS_CODE_NAMES:
            return STATUS_CODE_NAMES[kind]
    return "INTERNAL"


def error_from_reason(reason: str, message: str, metadata: Mapping[str, object] | None = None) -> SpecPoolError:
    """Rebuild the typed error that a peer sent as (reason, message, metadata)."""
    kind = next((k for k in _all_kinds(SpecPoolError) if k.default_reason == reason), SpecPoolError)
    return kind(message, reason=reason, metadata=metadata)


def _all_kinds(root: type[SpecPoolError]) -> Iterator[type[SpecPoolError]]:
    for kind in root.__subclasses__():
        yield kind
        yield from _all_kinds(kind)
