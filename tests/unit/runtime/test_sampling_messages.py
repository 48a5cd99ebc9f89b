"""Sampling parameters and the protocol."""

from __future__ import annotations

from specpool.algorithm.sampling import SamplingParams
from specpool.v1 import types_pb2
from specpool_engine.runtime.sampling_messages import sampling_from_proto, sampling_to_proto


def test_unset_fields_take_the_documented_defaults() -> None:
    assert sampling_from_proto(types_pb2.SamplingParams()) == SamplingParams(temperature=0, max_tokens=128)


def test_explicit_zeros_are_not_defaults() -> None:
    message = types_pb2.SamplingParams(top_p=0, repetition_penalty=0, max_tokens=0, seed=0, num_logprobs=0)
    params = sampling_from_proto(message)
    values = (params.top_p, params.repetition_penalty, params.max_tokens, params.seed, params.num_logprobs)
    assert values == (0, 0, 0, 0, 0)


def test_round_trip() -> None:
    params = SamplingParams(
        temperature=0.7,
        top_p=0.9,
        top_k=5,
        min_p=0.1,
        repetition_penalty=1.1,
        presence_penalty=-1,
        frequency_penalty=0.5,
        logit_bias={3: -1.5},
        seed=-7,
        max_tokens=9,
        stop_token_ids=(1, 2),
        ignore_eos=True,
        num_logprobs=0,
    )
    assert sampling_from_proto(sampling_to_proto(params)) == params
    defaults = SamplingParams()
    assert sampling_from_proto(sampling_to_proto(defaults)) == defaults


def test_stop_strings_do_not_travel_to_a_speculator() -> None:
    assert not sampling_to_proto(SamplingParams(stop=("secret",))).stop


def test_unsigned_seeds_keep_their_bits() -> None:
    assert sampling_to_proto(SamplingParams(seed=2**64 - 1)).seed == -1
