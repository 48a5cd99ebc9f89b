"""What a session remembers of its stream, and what the request's span says of it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from opentelemetry import trace

from specpool.errors import Draining, InvalidArgument, SpecPoolError
from specpool.telemetry import tracing
from specpool.v1 import inference_pb2, types_pb2
from specpool_router.auth.tenants import Tenant
from specpool_router.generation.target_run import Event
from specpool_router.sessions.lease import Lease
from specpool_router.sessions.session_store import SessionState
from specpool_router.sessions.sessions import Sessions


class Recording:
    """Journals the events of one stream."""

    def __init__(self, sessions: Sessions, lease: Lease) -> None:
        self.state = SessionState.DETACHED
        self.ending = b""
        self.is_invalid = False
        """Whether the stream failed because of what the request says."""
        self._sessions = sessions
        self._lease = lease

    def add(self, event: Event) -> None:
        """Journal the next event."""
        if event.HasField("delta"):
            self._sessions.append(self._lease, event.delta.SerializeToString(), len(event.delta.token_ids))
        elif event.HasField("finished"):
            self.state, self.ending = SessionState.FINISHED, event.finished.SerializeToString()
            annotate_end(event.finished)


@contextmanager
def recording(sessions: Sessions, lease: Lease) -> Iterator[Recording]:
    """A context that records a stream: whatever way it ends, the session is told."""
    record = Recording(sessions, lease)
    try:
        yield record
    except SpecPoolError as error:
        # What a stopping router ends may go on elsewhere; what did not begin may begin there, with the same id.
        if not (isinstance(error, Draining) and lease.began):
            record.state = SessionState.FAILED
        record.is_invalid = isinstance(error, InvalidArgument)
        raise
    finally:
        sessions.finish(lease, record.state, record.ending, invalid=record.is_invalid)


def annotate(request: inference_pb2.GenerateRequest, tenant: Tenant) -> None:
    """Tell the current span what is asked for."""
    span = trace.get_current_span()
    span.set_attribute(tracing.GEN_AI_OPERATION_NAME, "chat" if request.HasField("chat") else "text_completion")
    span.set_attribute(tracing.GEN_AI_PROVIDER_NAME, "specpool")
    span.set_attribute(tracing.GEN_AI_REQUEST_MODEL, request.model)
    span.set_attribute(tracing.GEN_AI_RESPONSE_ID, request.request_id)
    span.set_attribute(tracing.GEN_AI_REQUEST_SEED, request.sampling.seed)
    span.set_attribute(tracing.TENANT, tenant.name)


def annotate_end(finished: inference_pb2.GenerationFinished) -> None:
    """Tell the current span how the request ended."""
    span, usage = trace.get_current_span(), finished.usage
    reason = types_pb2.FinishReason.Name(finished.finish_reason).removeprefix("FINISH_REASON_").lower()
    span.set_attribute(tracing.GEN_AI_RESPONSE_FINISH_REASONS, [reason])
    span.set_attribute(tracing.GEN_AI_USAGE_INPUT_TOKENS, usage.num_prompt_tokens)
    span.set_attribute(tracing.GEN_AI_USAGE_OUTPUT_TOKENS, usage.num_completion_tokens)
