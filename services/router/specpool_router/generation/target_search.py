"""Finds the next target of one stream: waits where there is none, backs off from those that refused or were lost."""

from __future__ import annotations

import asyncio
from typing import Final

from specpool.backoff import Backoff
from specpool.errors import ModelNotFound, RequestCostTargets, SpecPoolError, TargetUnavailable
from specpool_router.generation.stop_signal import StopSignal
from specpool_router.generation.target_run import OVERLOADED, Target, TargetLost, TargetRefused
from specpool_router.placement.cluster import Cluster
from specpool_router.placement.pod_choice import choose_target, resolve_model

_FIRST_PAUSE_S: Final = 0.1
_LONGEST_PAUSE_S: Final = 1.0
_LOOK_S: Final = 0.25
"""Seconds for which a stop may go unnoticed while nothing changes."""
_MAX_TARGETS_COST: Final = 2
"""Most targets that a request may cost: two lost while they ran it, with no token between, are enough."""


class TargetSearch:
    """Chooses the targets of one stream, by what it knows of those that it tried."""

    def __init__(
        self,
        cluster: Cluster,
        stop: StopSignal,
        *,
        model: str,
        session_id: str,
        is_new: bool,
        request_wait_s: float,
        failover_wait_s: float,
    ) -> None:
        self._targets = cluster.targets
        self._stop = stop
        self._model = model
        self._session_id = session_id
        self._failover_wait_s = failover_wait_s
        self._loop = asyncio.get_running_loop()
        self._deadline_s = self._loop.time() + (request_wait_s if is_new else failover_wait_s)
        self._is_new = is_new
        self._num_cost = 0
        self._avoided: dict[str, tuple[float, Backoff]] = {}
        """Until when each target is left alone; forgotten for all once the time for waiting is over."""
        self._refusal: SpecPoolError | None = None

    async def next(self) -> Target | None:
        """The next target to try, None once the stream is stopped; raises when it has waited long enough."""
        while not self._stop.is_set:
            now_s = self._loop.time()
            try:
                return self._choose(now_s)
            except TargetUnavailable as error:
                overloaded = self._is_new and self._refusal is not None and self._refusal.reason == OVERLOADED
                if overloaded or now_s >= self._deadline_s:
                    raise (self._refusal or error) from error
            await self._targets.wait_for_change(self._pause_s(now_s))
        return None

    def lost(self, target: Target, loss: TargetLost, *, progressed: bool) -> None:
        """Note that a target was lost in the middle; raises if the request is not to be given to another."""
        self._targets.mark_lost(target, str(loss))
        self._refusal = None
        self._num_cost = loss.ran + (0 if progressed else self._num_cost)
        if self._num_cost >= _MAX_TARGETS_COST:
            raise RequestCostTargets(
                f"{self._num_cost} targets were lost while they ran this request, the last one because {loss}",
                metadata={"num_targets": self._num_cost},
            )
        self._continue_later(target, progressed=progressed)

    def refused(self, target: Target, refusal: TargetRefused, *, progressed: bool) -> None:
        """Note that a target is well and does not run the request now."""
        self._refusal = refusal.error
        if progressed or refusal.ran or not self._is_new:
            self._continue_later(target, progressed=progressed)
        else:
            self._avoid(target)

    def _continue_later(self, target: Target, *, progressed: bool) -> None:
        if progressed or self._is_new:
            self._deadline_s = self._loop.time() + self._failover_wait_s
            self._avoided.clear()
        self._is_new = False
        self._avoid(target)

    def _avoid(self, target: Target) -> None:
        address = target.endpoint.address
        _, backoff = self._avoided.get(address) or (0.0, Backoff(first_s=_FIRST_PAUSE_S, longest_s=_LONGEST_PAUSE_S))
        self._avoided[address] = (self._loop.time() + backoff.next_s(), backoff)

    def _choose(self, now_s: float) -> Target:
        is_over = now_s >= self._deadline_s
        avoided = {address for address, (until_s, _) in self._avoided.items() if is_over or until_s > now_s}
        chosen = choose_target(
            self._targets.candidates(), model=self._model, session_id=self._session_id, exclude=avoided
        )
        target = self._targets.get(chosen.endpoint)
        assert target is not None, "candidates are pods that are known"
        return target

    def _pause_s(self, now_s: float) -> float:
        ends_s = [until_s - now_s for until_s, _ in self._avoided.values() if until_s > now_s]
        return max(0.0, min(_LOOK_S, self._deadline_s - now_s, *ends_s))


async def wait_for_model(cluster: Cluster, stop: StopSignal, model: str, *, wait_s: float) -> str:
    """The full name of ``model``, once a target is known that serves any; raises what ``stop`` says once it is set."""
    loop = asyncio.get_running_loop()
    deadline_s = loop.time() + wait_s
    while True:
        try:
            return resolve_model(cluster.targets.candidates(), model)
        except ModelNotFound:
            if cluster.targets.served_lately(model):
                return model
            raise
        except TargetUnavailable as error:
            remaining_s = deadline_s - loop.time()
            if stop.is_set:
                raise (stop.error or error) from error
            if remaining_s <= 0:
                raise
        await cluster.targets.wait_for_change(min(remaining_s, _LOOK_S))
