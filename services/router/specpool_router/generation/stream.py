"""One request on its way from targets to the client: the stream goes on when its target is lost.

The next target continues from the committed tokens with the same seed, so it commits the same tokens; it is told how
many characters of text there are, and emits what the lost one still held back.
"""

from __future__ import annotations

import logging
from collections.abc import AsyncGenerator, Iterator
from contextlib import aclosing
from dataclasses import dataclass

from specpool.v1 import inference_pb2, target_pb2, types_pb2
from specpool_router.generation.progress import Progress
from specpool_router.generation.shared_streams import SharedStreams
from specpool_router.generation.stop_signal import StopSignal
from specpool_router.generation.target_run import Event, Target, TargetLost, TargetRefused, TargetRun
from specpool_router.generation.target_search import TargetSearch
from specpool_router.metrics import RouterMetrics
from specpool_router.placement.cluster import Cluster
from specpool_router.sessions.lease import Lease
from specpool_router.sessions.sessions import Sessions

_logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class Patience:
    """How long a stream waits, by what it waits for."""

    request_wait_s: float
    """Seconds to wait for a target before anything ran."""
    failover_wait_s: float
    """Seconds to wait for another target, since the last token."""
    progress_timeout_s: float
    """Seconds to wait for a sign of life of the target that runs the request."""


class Stream:
    """Runs one request from where `progress` stands. `events` is what came of it."""

    def __init__(
        self,
        request: inference_pb2.GenerateRequest,
        lease: Lease,
        stop: StopSignal,
        progress: Progress,
        *,
        cluster: Cluster,
        sessions: Sessions,
        metrics: RouterMetrics,
        patience: Patience,
        targets: SharedStreams,
    ) -> None:
        self.request = request
        self.progress = progress
        self._lease = lease
        self._stop = stop
        self._cluster = cluster
        self._sessions = sessions
        self._metrics = metrics
        self._patience = patience
        self._targets = targets
        self._has_started = False
        self._held_text = ""

    async def events(self) -> AsyncGenerator[Event, None]:
        """`started`, deltas, `finished`: from as many targets as it takes."""
        search = self._search()
        while (target := await search.next()) is not None:
            num_tokens = len(self.progress.token_ids)
            try:
                async with aclosing(self._run_on(target)) as events:
                    async for event in events:
                        yield event
                        if event.HasField("finished"):
                            return
            except TargetRefused as refusal:
                if refusal.ran:
                    self._metrics.failover()
                search.refused(target, refusal, progressed=len(self.progress.token_ids) > num_tokens)
            except TargetLost as loss:
                if self._stop.is_set:
                    break
                _logger.warning("%s lost its target %s: %s", self.request.request_id, target.endpoint.address, loss)
                search.lost(target, loss, progressed=len(self.progress.token_ids) > num_tokens)
                self._metrics.failover()
        if self._stop.error is not None:
            raise self._stop.error
        for event in self._rest_of_text():
            yield event
        yield self._cancelled()

    def _search(self) -> TargetSearch:
        return TargetSearch(
            self._cluster,
            self._stop,
            model=self.request.model,
            session_id=self.request.session_id,
            is_new=not self.progress.token_ids,
            request_wait_s=self._patience.request_wait_s,
            failover_wait_s=self._patience.failover_wait_s,
        )

    async def _run_on(self, target: Target) -> AsyncGenerator[Event, None]:
        """Events of one target, without those that the client has already."""
        self._sessions.pair(self._lease, target.endpoint.address, "")
        timeout_s = self._patience.progress_timeout_s
        run = TargetRun(target, self._run_request(), self._targets, progress_timeout_s=timeout_s)
        self._stop.on_set(run.cancel)
        async with aclosing(run.events()) as events:
            async for event in events:
                if event.HasField("paired"):
                    self._sessions.pair(self._lease, target.endpoint.address, event.paired.endpoint)
                for shown in self._take_in(event):
                    yield shown

    def _run_request(self) -> target_pb2.RunSequenceRequest:
        tenant = self._lease.tenant
        return target_pb2.RunSequenceRequest(
            request=self.request,
            tenant=tenant.name,
            tenant_weight=tenant.weight,
            cache_salt=tenant.cache_salt,
            committed_token_ids=self.progress.token_ids,
            num_text_chars_sent=self.progress.num_chars,
            was_running=self._has_started,
            speculators=self._cluster.speculator_endpoints,
        )

    def _take_in(self, event: Event) -> Iterator[Event]:
        """Note what an event brings; gives what of it is passed on."""
        if event.HasField("started"):
            if not self._has_started:
                self._has_started = True
                self._count_prompt(event.started.num_prompt_tokens)
                yield event
        elif event.HasField("delta"):
            self.progress.add(event.delta)
            self._metrics.tenant_tokens(self._lease.tenant.name, num_completion_tokens=len(event.delta.token_ids))
            # Text without tokens travels with the next token, so that a count of tokens says what text a client has.
            event.delta.text = self._held_text + event.delta.text
            self._held_text = "" if event.delta.token_ids else event.delta.text
            if event.delta.token_ids:
                yield event
        elif event.HasField("finished"):
            yield from self._rest_of_text()
            event.finished.usage.num_completion_tokens = len(self.progress.token_ids)
            yield event

    def _count_prompt(self, num_tokens: int) -> None:
        self.progress.num_prompt_tokens = num_tokens
        if not self.progress.is_prompt_counted:
            self.progress.is_prompt_counted = True
            self._sessions.count_tokens(self._lease, num_tokens)
            self._metrics.tenant_tokens(self._lease.tenant.name, num_prompt_tokens=num_tokens)

    def _rest_of_text(self) -> Iterator[Event]:
        if self._held_text:
            yield Event(delta=inference_pb2.GenerationDelta(text=self._held_text))
            self._held_text = ""

    def _cancelled(self) -> Event:
        """The polite end of a request that was cancelled."""
        usage = types_pb2.Usage(
            num_prompt_tokens=self.progress.num_prompt_tokens, num_completion_tokens=len(self.progress.token_ids)
        )
        return Event(
            finished=inference_pb2.GenerationFinished(finish_reason=types_pb2.FINISH_REASON_CANCELLED, usage=usage)
        )
