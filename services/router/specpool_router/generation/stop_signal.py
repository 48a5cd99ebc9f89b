"""How one stream is told to end: by a cancellation, by a stream that took its session over, or by the router's end."""

from __future__ import annotations

from collections.abc import Callable

from specpool.errors import Draining, SpecPoolError, TargetUnavailable
from specpool_router.sessions.session_store import SessionState


class StopSignal:
    """Exists before the stream does, so that a session can be opened with it and a stream with the session's lease."""

    def __init__(self) -> None:
        self.is_set = False
        self.error: SpecPoolError | None = None
        """What the client is told; None: a polite end, since it was cancelled."""
        self._callback: Callable[[], None] | None = None

    def on_set(self, callback: Callable[[], None]) -> None:
        """Call ``callback`` once it is set, in place of the callback given before."""
        self._callback = callback
        if self.is_set:
            callback()

    def stop(self, state: SessionState) -> None:
        """CANCELLED: the session was cancelled. Anything else: another stream has taken it over."""
        if state is SessionState.CANCELLED:
            self._set(None)
        else:
            self._set(TargetUnavailable("another stream resumed this request", reason="SESSION_TAKEN_OVER"))

    def drain(self) -> None:
        """The router stops: the client may go on elsewhere."""
        self._set(Draining("this router stops; resume the request at another", metadata={"retriable": "true"}))

    def _set(self, error: SpecPoolError | None) -> None:
        if self.is_set:
            return
        self.is_set, self.error = True, error
        if self._callback is not None:
            self._callback()
