"""How one stream is told to end: by a cancellation, by a stream that took its session over, or by the router's end."""

from __future__ import annotations

from collections.abc import Callable

from specpool.errors import Draining, SpecPoolError, TargetUnavailable
from specpool_router.sessions.session_store import SessionState


class StopSignal:
    """Tells one stream to end. It exists before the stream, so that a session can be opened with it."""

    def __init__(self) -> None:
        self.is_set = False
        self.error: SpecPoolError | None = None
        """The error that the client is told; None: a polite end, since the request was cancelled."""
        self._callback: Callable[[], None] | None = None

    def on_set(self, callback: Callable[[], None]) -> None:
        """Call ``callback`` once the signal is set, in place of the callback given before."""
        self._callback = callback
        if self.is_set:
            callback()

    def stop(self, state: SessionState) -> None:
        """End the stream: its session was cancelled (CANCELLED), or taken over by another stream (anything else)."""
        if state is SessionState.CANCELLED:
            self._set(None)
        else:
            self._set(TargetUnavailable("another stream resumed this request", reason="SESSION_TAKEN_OVER"))

    def drain(self) -> None:
        """End the stream since the router stops: the client may go on elsewhere."""
        self._set(Draining("this router stops; resume the request at another", metadata={"retriable": "true"}))

    def _set(self, error: SpecPoolError | None) -> None:
        if self.is_set:
            return
        self.is_set, self.error = True, error
        if self._callback is not None:
            self._callback()
