"""Sampling parameters between the protocol and the engines. The router hands these messages through."""

from __future__ import annotations

from typing import Final

from specpool.algorithm.sampling import SamplingParams
from specpool.v1 import types_pb2

# What the protocol documents for unset fields.
DEFAULT_TEMPERATURE: Final = 0.0
DEFAULT_MAX_TOKENS: Final = 128
_SIGN_BIT: Final = 1 << 63


def sampling_from_proto(message: types_pb2.SamplingParams) -> SamplingParams:
    """The parameters of a message, with the documented defaults; see `SamplingParams.validate` for their check."""
    return SamplingParams(
        temperature=message.temperature if message.HasField("temperature") else DEFAULT_TEMPERATURE,
        top_p=message.top_p if message.HasField("top_p") else 1.0,
        top_k=message.top_k,
        min_p=message.min_p,
        repetition_penalty=message.repetition_penalty if message.HasField("repetition_penalty") else 1.0,
        presence_penalty=message.presence_penalty,
        frequency_penalty=message.frequency_penalty,
        logit_bias=dict(message.logit_bias),
        seed=message.seed if message.HasField("seed") else None,
        max_tokens=message.max_tokens if message.HasField("max_tokens") else DEFAULT_MAX_TOKENS,
        stop_token_ids=tuple(message.stop_token_ids),
        stop=tuple(message.stop),
        ignore_eos=message.ignore_eos,
        num_logprobs=message.num_logprobs if message.HasField("num_logprobs") else None,
    )


def sampling_to_proto(params: SamplingParams) -> types_pb2.SamplingParams:
    """The parameters that a speculator has to know to draft; every field is set: the reader's defaults play no part.

    Stop strings stay here: they are found in text, and only the target has that.
    """
    return types_pb2.SamplingParams(
        temperature=params.temperature,
        top_p=params.top_p,
        top_k=params.top_k,
        min_p=params.min_p,
        repetition_penalty=params.repetition_penalty,
        presence_penalty=params.presence_penalty,
        frequency_penalty=params.frequency_penalty,
        logit_bias=dict(params.logit_bias),
        seed=None if params.seed is None else _signed(params.seed),
        max_tokens=params.max_tokens,
        stop_token_ids=params.stop_token_ids,
        ignore_eos=params.ignore_eos,
        num_logprobs=params.num_logprobs,
    )


def _signed(seed: int) -> int:
    """The signed 64-bit integer of the same bits as an unsigned seed, which gives the same noise."""
    return (seed & (2 * _SIGN_BIT - 1)) - (2 * _SIGN_BIT if seed & _SIGN_BIT else 0)
