"""Prometheus metrics of one target. They observe and never steer."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from specpool.telemetry.metrics import (
    OTHER,
    REQUEST_BUCKETS_S,
    STEP_BUCKETS_S,
    CountedHistogram,
    EngineInfo,
    TransportInfo,
    add,
    children,
    dense_bytes,
)
from specpool_target.engine.statistics import StepStats

LOOKUP_OUTCOMES: Final = ("hit", "partial", "late", "miss")
ROUND_PHASES: Final = ("waiting", "forward", "verify", "other")
FALLBACK_REASONS: Final = ("wait", "backup", "no_draft", "deadline", "speculator_lost", "late_distributions")
"""Why a round was not what it should have been: a miss waited for a speculation, used the backup, or had no draft; a
deadline passed; the speculator was lost; draft distributions came too late (sample-and-match)."""
MOVE_REASONS: Final = ("lost", "refused", "going_away", "unlisted", "silent", "crowded")
"""Why a running sequence left its speculator: the stream was lost; it does not take the sequence; it drains; the
directory names it no more, or as one that goes; it owed an answer for long; another has been better for long."""
TOKEN_BUCKETS_S: Final = (0.002, 0.005, 0.01, 0.02, 0.035, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.5, 0.75, 1, 2.5, 5, 10)
FIRST_TOKEN_BUCKETS_S: Final = (0.005, 0.01, 0.02, 0.05, 0.1, 0.25, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40, 80, 160)


class TargetMetrics:
    """Metrics of one target process."""

    def __init__(self, model_name: str, registry: CollectorRegistry | None = None) -> None:
        self.registry = registry or CollectorRegistry()
        make = _Factory(self.registry, model_name)
        self._running = make.gauge("vllm:num_requests_running", "Sequences in the batch.")
        self._waiting = make.gauge("vllm:num_requests_waiting", "Sequences waiting for admission.")
        self._kv_usage = make.gauge("vllm:kv_cache_usage_perc", "Share of KV blocks in use; 1 is all of them.")
        self._preemptions = make.counter("vllm:num_preemptions", "Sequences preempted for lack of KV blocks.")
        self._prompt_tokens = make.counter("vllm:prompt_tokens", "Prompt tokens prefilled.")
        self._prefix_queries = make.counter(
            "vllm:prefix_cache_queries", "Tokens of admitted sequences, looked up in the prefix cache."
        )
        self._prefix_hits = make.counter("vllm:prefix_cache_hits", "Tokens of these that the prefix cache had.")
        self._generation_tokens = make.counter("vllm:generation_tokens", "Tokens committed.")
        self._drafts = make.counter("vllm:spec_decode_num_drafts", "Verifications with draft tokens.")
        self._draft_tokens = make.counter("vllm:spec_decode_num_draft_tokens", "Draft tokens verified.")
        self._accepted = make.counter("vllm:spec_decode_num_accepted_tokens", "Draft tokens accepted.")
        self._first_token = make.histogram(
            "vllm:time_to_first_token_seconds", "Admission to first token.", FIRST_TOKEN_BUCKETS_S
        )
        self._inter_token = CountedHistogram(
            "vllm:inter_token_latency_seconds",
            "Between tokens of one request.",
            {"model_name": model_name},
            TOKEN_BUCKETS_S,
            self.registry,
        )
        self._e2e = make.histogram("vllm:e2e_request_latency_seconds", "Whole requests.", REQUEST_BUCKETS_S)
        self._finished = Counter(
            "vllm:request_success",
            "Requests finished.",
            ["model_name", "finished_reason"],
            registry=self.registry,
        )
        self._model_name = model_name
        self._init_speculation()

    def _init_speculation(self) -> None:
        self._lookups = children(
            Counter(
                "specpool_speculation_lookups",
                "Lookups in the speculation cache by outcome.",
                ["outcome"],
                registry=self.registry,
            ),
            LOOKUP_OUTCOMES,
        )
        self._phases = children(
            Histogram(
                "specpool_round_duration_seconds",
                "Time of a step, which ends one round of each of its sequences, by phase.",
                ["phase"],
                buckets=STEP_BUCKETS_S,
                registry=self.registry,
            ),
            ROUND_PHASES,
        )
        self._fallbacks = children(
            Counter("specpool_fallback", "Rounds that fell back, by reason.", ["reason"], registry=self.registry),
            (*FALLBACK_REASONS, OTHER),
        )
        self._stale = Counter(
            "specpool_stale_messages",
            "Messages dropped because their incarnation, sequence or round has passed.",
            registry=self.registry,
        )
        self._moves = children(
            Counter(
                "specpool_sequence_moves",
                "Running sequences that lost their speculator or were given to another, by reason.",
                ["reason"],
                registry=self.registry,
            ),
            (*MOVE_REASONS, OTHER),
        )
        self._links = Gauge(
            "specpool_speculator_links", "Speculators connected to this target.", registry=self.registry
        )
        self._transport = TransportInfo(self.registry)
        self._dense_bytes = dense_bytes(self.registry)
        self._engine = EngineInfo(self.registry)

    def observe_step(self, step: StepStats) -> None:
        """Take in one step."""
        self._running.set(step.num_running)
        self._waiting.set(step.num_waiting)
        self._kv_usage.set(step.kv_cache_usage)
        for phase, seconds in zip(
            ROUND_PHASES, (step.waiting_s, step.forward_s, step.verify_s, step.other_s), strict=True
        ):
            self._phases[phase].observe(seconds)
        add(self._drafts, step.num_drafts)
        add(self._draft_tokens, step.num_draft_tokens)
        add(self._accepted, step.num_accepted_tokens)
        add(self._prompt_tokens, step.num_prompt_tokens)
        add(self._generation_tokens, step.num_generation_tokens)
        add(self._preemptions, step.num_preemptions)
        for outcome, count in zip(
            LOOKUP_OUTCOMES, (step.num_hits, step.num_partial, step.num_late, step.num_misses), strict=True
        ):
            add(self._lookups[outcome], count)
        for reason, count in step.fallbacks.items():
            add(self._fallbacks.get(reason, self._fallbacks[OTHER]), count)

    def set_queue(self, *, num_running: int, num_waiting: int, kv_cache_usage: float) -> None:
        """Set the gauges between steps: when the batch empties, no step reports it."""
        self._running.set(num_running)
        self._waiting.set(num_waiting)
        self._kv_usage.set(kv_cache_usage)

    def prefix_cache(self, num_queried_tokens: int, num_hit_tokens: int) -> None:
        """Count the tokens of an admitted sequence, and those of them that the prefix cache had."""
        add(self._prefix_queries, num_queried_tokens)
        add(self._prefix_hits, num_hit_tokens)

    def first_token(self, seconds: float) -> None:
        """Count a request's first token, ``seconds`` after its arrival."""
        self._first_token.observe(seconds)

    def inter_token(self, seconds: float, num_tokens: int = 1) -> None:
        """Count ``num_tokens`` that a request got at once, ``seconds`` after the ones before."""
        self._inter_token.observe(seconds / num_tokens, num_tokens)

    def request_finished(self, reason: str, seconds: float) -> None:
        """Count a request that ended by `reason`: stop, length, cancelled or error."""
        self._finished.labels(self._model_name, reason).inc()
        self._e2e.observe(seconds)

    def stale_message(self, count: int = 1) -> None:
        """Count messages from a speculator that were dropped as stale."""
        self._stale.inc(count)

    def sequence_moved(self, reason: str) -> None:
        """Count a running sequence that lost its speculator, or has another. May be called from any thread."""
        self._moves.get(reason, self._moves[OTHER]).inc()

    def set_links(self, num_connected: int) -> None:
        """Set how many speculators are connected."""
        self._links.set(num_connected)

    def set_transports(self, transports: Iterable[str]) -> None:
        """Set which transports of draft distributions are in use."""
        self._transport.set(transports)

    def dense_distributions(self, num_bytes: int) -> None:
        """Count bytes of dense draft distributions, sent or received. May be called from any thread."""
        self._dense_bytes.inc(num_bytes)

    def set_engine(self, *, attention_backend: str, dtype: str, device: str) -> None:
        """Set what the engine runs with."""
        self._engine.set(self._model_name, attention_backend, dtype, device)


class _Factory:
    """Makes metrics with the one label ``model_name``, as children ready for use."""

    def __init__(self, registry: CollectorRegistry, model_name: str) -> None:
        self._registry = registry
        self._model_name = model_name

    def gauge(self, name: str, text: str) -> Gauge:
        return Gauge(name, text, ["model_name"], registry=self._registry).labels(self._model_name)

    def counter(self, name: str, text: str) -> Counter:
        return Counter(name, text, ["model_name"], registry=self._registry).labels(self._model_name)

    def histogram(self, name: str, text: str, buckets: tuple[float, ...]) -> Histogram:
        metric = Histogram(name, text, ["model_name"], buckets=buckets, registry=self._registry)
        return metric.labels(self._model_name)
