"""JSON shapes of the command line: what scripts rely on."""

from __future__ import annotations

from typing import Any

from specpool.client import Completion
from specpool.v1 import router_pb2, speculator_pb2, target_pb2, types_pb2

_RENAMED = {"accepted_tokens": "accepted"}


def plain_fields(message: Any) -> dict[str, Any]:
    """The scalar fields of a message, in order, without the protocol's `num_`."""
    result: dict[str, Any] = {}
    for field in message.DESCRIPTOR.fields:
        if field.message_type is None:
            value = getattr(message, field.name)
            name = field.name.removeprefix("num_")
            result[_RENAMED.get(name, name)] = list(value) if field.is_repeated else value
    return result


def finish_reason(value: types_pb2.FinishReason.ValueType) -> str:
    """Name of a finish reason: `stop`, `length` or `cancelled`."""
    return types_pb2.FinishReason.Name(value).removeprefix("FINISH_REASON_").lower()


def completion_document(completion: Completion) -> dict[str, Any]:
    """The object that `generate --output json` prints."""
    return {
        "text": completion.text,
        "token_ids": list(completion.token_ids),
        "finish_reason": finish_reason(completion.finish_reason),
        "seed": completion.seed,
        "usage": plain_fields(completion.usage),
        "stats": plain_fields(completion.stats),
    }


def state_name(value: types_pb2.ServingState.ValueType) -> str:
    """Name of a serving state: `serving`, `starting` or `draining`."""
    return types_pb2.ServingState.Name(value).removeprefix("SERVING_STATE_").lower()


def peer_document(peer: types_pb2.Peer) -> dict[str, Any]:
    """A peer's JSON object. Incarnations are 64 bits wide: as hex text they survive every JSON reader."""
    return {"id": peer.id, "incarnation": f"{peer.incarnation:016x}", "endpoint": peer.endpoint}


def status_document(status: router_pb2.GetClusterStatusResponse) -> dict[str, Any]:
    """The object that `status --output json` prints."""
    return {
        "router": {**peer_document(status.router), "state": state_name(status.state)},
        "session_store": status.session_store,
        "session_store_reachable": status.session_store_reachable,
        "streams_running": status.num_streams_running,
        "targets": [_target(entry) for entry in status.targets],
        "speculators": [_speculator(entry) for entry in status.speculators],
    }


def _target(entry: router_pb2.TargetEntry) -> dict[str, Any]:
    status = entry.status
    return {
        **peer_document(status.target),
        "endpoint": entry.endpoint,
        "reachable": entry.reachable,
        "error": entry.error,
        "state": state_name(status.state),
        "model": plain_fields(status.model),
        "load": plain_fields(status.load),
        "max_lookahead": status.max_lookahead,
        "refusals": {count.reason: count.num_requests for count in status.refusals},
        **_signs_of_life(status),
        "plan": status.plan,
        "speculators": [
            {**plain_fields(link), "speculator": peer_document(link.speculator)} for link in status.speculators
        ],
    }


def _signs_of_life(
    status: target_pb2.GetTargetStatusResponse | speculator_pb2.GetSpeculatorStatusResponse,
) -> dict[str, Any]:
    return {"num_steps": status.num_steps, "seconds_in_step": status.seconds_in_step}


def _speculator(entry: router_pb2.SpeculatorEntry) -> dict[str, Any]:
    status = entry.status
    return {
        **peer_document(status.speculator),
        "endpoint": entry.endpoint,
        "reachable": entry.reachable,
        "error": entry.error,
        "state": state_name(status.state),
        "model": plain_fields(status.model),
        "load": plain_fields(status.load),
        "row_budget": status.row_budget,
        "max_lookahead": status.max_lookahead,
        "acceptance_rate": status.acceptance_rate,
        "miss_power_law": list(status.miss_power_law),
        "confidence_spread": status.confidence_spread,
        "fan_out_policy": status.fan_out_policy,
        "refusals": {
            speculator_pb2.RefusalReason.Name(count.reason).removeprefix("REFUSAL_REASON_").lower(): count.num_sequences
            for count in status.refusals
        },
        **_signs_of_life(status),
        "plan": status.plan,
        "targets": [peer_document(target) for target in status.targets],
    }
