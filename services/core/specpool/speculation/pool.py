"""The pool of speculators, for one engine.

    pool = SpeculationPool(directory, identity)
    pool.start()
    handle = pool.open(prompt_tokens, sampling)     # when the prefill starts
    draft = handle.next(0, first_token)             # after each round: how it ended
    handle.started(draft.tokens)                    # what the next one verifies
    handle.close()

By default the pool has a thread with an event loop of its own; an engine that has a loop may give it.
"""

from __future__ import annotations

import asyncio
import logging
import threading
import uuid
from collections.abc import Coroutine, Sequence
from concurrent.futures import Future
from typing import Any, Final

from specpool.discovery.discovery import Discovery
from specpool.errors import InvalidArgument
from specpool.speculation.connection import PlacedSequence
from specpool.speculation.dense import DenseReceiver
from specpool.speculation.handle import SequenceHandle
from specpool.speculation.handle_owner import SequenceEvents
from specpool.speculation.identity import PoolIdentity
from specpool.speculation.members import Member
from specpool.speculation.outbox import Outbox
from specpool.speculation.pairing import Pairing, PoolEvents
from specpool.speculation.pairing_settings import PairingSettings
from specpool.v1 import speculator_pb2, types_pb2

_logger = logging.getLogger(__name__)
_CLOSE_S: Final = 10.0
_SETTLE_POLL_S: Final = 0.005
_MAX_TOKEN: Final = 2**32


class SpeculationPool:
    """Speculators for an engine. Callable on any thread; only `close` and `wait_settled` block, within deadlines."""

    def __init__(
        self,
        directory: Discovery,
        identity: PoolIdentity,
        *,
        loop: asyncio.AbstractEventLoop | None = None,
        settings: PairingSettings | None = None,
        receiver: DenseReceiver | None = None,
        events: PoolEvents | None = None,
        flushes_itself: bool = True,
    ) -> None:
        """Make the pool; nothing is connected before `start`.

        Args:
            directory: names the speculators; started and closed by the pool.
            identity: of the engine.
            loop: where the pool works, if not on a thread of its own; it must be running.
            settings: of the pairing.
            receiver: of dense draft distributions, if the engine has a transport for them.
            events: for metrics.
            flushes_itself: False: outcomes are sent when the engine calls `flush`, once for all sequences of a step.
        """
        self.outbox = Outbox()
        self.vocab_size = identity.model.vocab_size
        self._identity = identity
        self._is_own_loop = loop is None
        self._loop = loop or asyncio.new_event_loop()
        self._flushes_itself = flushes_itself
        self._is_flushing = False
        self._handles: dict[str, SequenceHandle] = {}
        self._is_closed = False
        self._thread: threading.Thread | None = None
        self._pairing = Pairing(
            directory,
            identity,
            settings=settings or PairingSettings(),
            events=events or PoolEvents(),
            receiver=receiver,
        )

    # ---- start and end ----------------------------------------------------------------------------------------

    def start(self) -> Future[None]:
        """Begin to look for speculators and to connect; returns at once. The result raises if nobody can be asked."""
        if self._is_own_loop:
            self._thread = threading.Thread(target=self._run_loop, name="speculation pool", daemon=True)
            self._thread.start()
        started = self._schedule(self._pairing.start())
        started.add_done_callback(_log_failure)
        return started

    def close(self) -> None:
        """Free every sequence and end all streams. Call it from a thread other than the loop's. May be called twice."""
        if self._loop.is_closed() or (self._is_own_loop and self._thread is None):
            return  # it is closed already, or was never started
        try:
            self._schedule(self.aclose()).result(_CLOSE_S)
        except TimeoutError:
            _logger.warning("the streams to speculators did not end within %g s; going on without", _CLOSE_S)
        if self._thread is not None:
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join(_CLOSE_S)

    async def aclose(self) -> None:
        """Free every sequence and end all streams; to be awaited on the loop that was given."""
        self._is_closed = True
        for handle in list(self._handles.values()):
            handle.close()
        self.deliver()
        await self._pairing.close()

    def wait_settled(self, timeout_s: float) -> bool:
        """Block as `settled` waits. Call it from a thread other than the loop's."""
        return bool(self._schedule(self.settled(timeout_s)).result(timeout_s + _CLOSE_S))

    async def settled(self, timeout_s: float) -> bool:
        """Wait until a speculator takes sequences, or none that is known can be reached; False: the time is over."""
        deadline_s = self._loop.time() + timeout_s
        while not self._pairing.has_settled():
            if self._loop.time() >= deadline_s:
                return False
            await asyncio.sleep(_SETTLE_POLL_S)
        return True

    def _run_loop(self) -> None:
        asyncio.set_event_loop(self._loop)
        try:
            self._loop.run_forever()
        finally:
            self._loop.close()

    def _schedule(self, work: Coroutine[Any, Any, Any]) -> Future[Any]:
        return asyncio.run_coroutine_threadsafe(work, self._loop)

    # ---- sequences --------------------------------------------------------------------------------------------

    def open(
        self,
        tokens: Sequence[int],
        sampling: types_pb2.SamplingParams,
        *,
        sequence_id: str = "",
        num_prompt_tokens: int | None = None,
        mode: int = types_pb2.SPECULATION_MODE_SSD,
        verification: int = types_pb2.VERIFICATION_MODE_COUPLED,
        max_lookahead: int | None = None,
        tenant: str = "",
        tenant_weight: float = 1.0,
        cache_salt: bytes = b"",
        traceparent: str = "",
        events: SequenceEvents | None = None,
        is_paused: bool = False,
    ) -> SequenceHandle:
        """Begin a sequence, best when its prefill begins. Never fails for want of a speculator.

        Args:
            tokens: prompt and output so far.
            sampling: with its seed; an engine that does not share the noise opens its sequences as greedy.
            sequence_id: unique among the live ones; by default drawn.
            num_prompt_tokens: of `tokens`; by default all.
            mode: SPECULATION_MODE_SSD, or SPECULATION_MODE_SD if all drafts are requested just in time.
            verification: VERIFICATION_MODE_REJECTION if draft distributions are wanted.
            max_lookahead: K, by default the engine's largest.
            tenant: whose sequence it is.
            tenant_weight: share of the speculator's rows, relative to other tenants.
            cache_salt: of the tenant's prefix cache.
            traceparent: W3C trace context.
            events: about this sequence.
            is_paused: it gets no speculator before `resume`.
        """
        opening = speculator_pb2.OpenSequence(
            sequence_id=sequence_id or uuid.uuid4().hex,
            tenant=tenant,
            tenant_weight=tenant_weight,
            cache_salt=cache_salt,
            num_prompt_tokens=len(tokens) if num_prompt_tokens is None else num_prompt_tokens,
            sampling=sampling,
            verification=verification,  # type: ignore[arg-type]
            mode=mode,  # type: ignore[arg-type]
            max_lookahead=self._identity.max_lookahead if max_lookahead is None else max_lookahead,
            traceparent=traceparent,
        )
        del opening.sampling.stop[:]  # text is nothing to a speculator
        if opening.sequence_id in self._handles:
            raise InvalidArgument(
                f"sequence {opening.sequence_id!r} is open already", metadata={"sequence_id": opening.sequence_id}
            )
        if len(tokens) == 0 or not 0 <= min(tokens) <= max(tokens) < _MAX_TOKEN:
            raise InvalidArgument("a sequence has at least one token, and no token below 0 or from 2^32 on")
        handle = SequenceHandle(self, opening, tokens, events or SequenceEvents(), is_paused=is_paused)
        self._handles[handle.id] = handle
        if self._is_closed:
            handle.close()
        elif not is_paused:
            self.place(handle)
        return handle

    def find(self, sequence_id: str) -> SequenceHandle | None:
        """The open sequence of this id; None if there is none."""
        return self._handles.get(sequence_id)

    def flush(self) -> None:
        """Send what was reported; once at the end of a step."""
        if not self.outbox.is_empty:
            self._wake()

    def deliver(self) -> None:
        """Send at once what was reported, for whoever is on the loop."""
        self._is_flushing = False
        for connection, requests in self.outbox.take():
            connection.send(requests)

    # ---- for status -------------------------------------------------------------------------------------------

    @property
    def members(self) -> list[Member]:
        """The speculators that are known, by address."""
        return [member for _, member in sorted(self._pairing.placement.members.items())]

    # ---- see `HandleOwner` ------------------------------------------------------------------------------------

    def reported(self) -> None:
        """Note that a handle has something to send."""
        if self._flushes_itself:
            self.flush()

    def hurry(self) -> None:
        """Send soon: a handle has something that nobody may flush soon."""
        self.flush()

    def place(self, handle: PlacedSequence) -> None:
        """Give a handle that needs one a speculator."""
        if not self._pairing.placement.place(handle):
            self._call(lambda: self._pairing.wait_for_place(handle))

    def forget(self, handle: PlacedSequence) -> None:
        """Forget a handle that is closed."""
        self._handles.pop(handle.id, None)

    def _wake(self) -> None:
        if not self._is_flushing:
            self._is_flushing = True
            self._call(self.deliver)

    def _call(self, callback: Any) -> None:
        try:
            self._loop.call_soon_threadsafe(callback)
        except RuntimeError:  # the loop is closed: the process, or the pool, is ending
            self._is_flushing = False


def _log_failure(started: Future[None]) -> None:
    if not started.cancelled() and (error := started.exception()) is not None:
        _logger.error("no speculators can be found: %s", error)
