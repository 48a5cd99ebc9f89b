"""The target service: bad input, text, continuation, drain, status, metrics."""

from __future__ import annotations

import asyncio
import math
import urllib.request

import grpc
import pytest

from specpool.errors import Draining
from specpool.rpc.errors import from_rpc_error
from specpool.v1 import target_pb2, types_pb2


async def refusal(target, message):
    """(status code, reason, message, metadata) of a refused request."""
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await target.run(message)
    error = from_rpc_error(caught.value)
    return caught.value.code().name, error.reason, error.message, error.metadata


BAD_SAMPLING = [
    ({"temperature": -1.0}, "temperature must be between 0 and 100, got -1.0"),
    ({"temperature": math.nan}, "temperature must be between 0 and 100, got nan"),
    ({"top_p": 0.0}, "top_p must be a number above 0 and at most 1, got 0.0"),
    ({"min_p": 2.0}, "min_p must be between 0 and 1, got 2.0"),
    ({"repetition_penalty": 0.0}, "repetition_penalty must be a number above 0 and at most 100, got 0.0"),
    ({"presence_penalty": 3.0}, "presence_penalty must be between -2 and 2, got 3.0"),
    ({"max_tokens": 0}, "max_tokens must be at least 1, got 0"),
    ({"logit_bias": {3: math.nan}}, "logit_bias[3] must be between -100 and 100, got nan"),
    ({"logit_bias": {99: 1.0}}, "logit_bias must be token ids from 0 to 23, got 99"),
    ({"stop_token_ids": [24]}, "stop_token_ids must be token ids from 0 to 23, got 24"),
    ({"stop": [""]}, "stop must be non-empty strings, got ''"),
    ({"num_logprobs": 21}, "num_logprobs must be between 0 and 20, got 21"),
]


@pytest.mark.parametrize(("sampling", "expected"), BAD_SAMPLING, ids=lambda v: str(v)[:40])
async def test_bad_sampling_is_refused_by_name(target_for, sampling, expected):
    target = await target_for()
    code, reason, message, metadata = await refusal(target, target.message(**sampling))
    assert (code, reason, message) == ("INVALID_ARGUMENT", "INVALID_ARGUMENT", expected)
    assert metadata["field"] == expected.split()[0]


async def test_bad_requests_are_refused_with_the_exact_reason(target_for):
    target = await target_for("toy#vocab=24,seed=3,context=64", num_kv_blocks=8, model_name="toy-24")
    unknown = target.message()
    unknown.request.model = "other"
    assert (await refusal(target, unknown))[:3] == (
        "NOT_FOUND",
        "MODEL_NOT_FOUND",
        "model 'other' is not served here; served: toy-24",
    )
    empty = "the prompt is empty: give text, chat messages or token ids with at least one token"
    for prompt in ((), ""):
        assert (await refusal(target, target.message(prompt)))[:3] == ("INVALID_ARGUMENT", "EMPTY_PROMPT", empty)
    assert (await refusal(target, target.message([1] * 64)))[:3] == (
        "INVALID_ARGUMENT",
        "CONTEXT_LENGTH_EXCEEDED",
        "prompt of 64 tokens leaves no room for output in the context of 64 tokens",
    )
    assert (await refusal(target, target.message([1] * 40)))[:3] == (
        "INVALID_ARGUMENT",
        "CONTEXT_LENGTH_EXCEEDED",
        "prompt of 40 tokens needs 11 KV blocks of 4 tokens, the cache has 8",
    )
    assert (await refusal(target, target.message([1, 24])))[
        2
    ] == "tokens.token_ids must be token ids from 0 to 23, got 24"
    assert (await refusal(target, target.message(committed=[99])))[2].startswith("committed_token_ids must be")
    assert (await refusal(target, target.message(committed=[3], seed=None)))[2] == (
        "sampling.seed must be set when a stream is continued, got unset"
    )
    chat = target.message()
    chat.request.chat.messages.add(role="robot", content="hello")
    assert (await refusal(target, chat))[2] == ("chat.messages.role must be system or user or assistant, got robot")
    assert len((await target.generate()).tokens) > 0


async def test_text_prompt_stream_and_usage(target_for):
    target = await target_for()
    message = target.message("hello", temperature=1.0, max_tokens=9)
    message.request.request_id = "mine"
    got = await target.run(message)
    assert got.started.request_id == "mine"
    assert (got.started.model, got.started.seed, got.started.num_prompt_tokens) == ("toy", 11, 5)
    assert got.finished.finish_reason == types_pb2.FINISH_REASON_LENGTH
    usage = got.finished.usage
    assert (usage.num_prompt_tokens, usage.num_completion_tokens) == (5, 9)
    assert len(got.text) == sum(token != 0 for token in got.tokens)


async def test_chat_is_rendered_with_the_template(target_for):
    target = await target_for()
    chat = target.message()
    chat.request.chat.messages.add(role="user", content="ab")
    plain = await target.run(target.message("ab\n"))
    assert (await target.run(chat)).tokens == plain.tokens


async def test_drawn_seed_is_reported_and_repeats_the_output(target_for):
    target = await target_for()
    first = await target.generate(temperature=1.0, seed=None)
    again = await target.generate(temperature=1.0, seed=first.started.seed)
    other = await target.generate(temperature=1.0, seed=None)
    assert again.tokens == first.tokens
    assert other.started.seed != first.started.seed
    assert other.tokens != first.tokens


async def test_end_token_stops_unless_ignored(target_for):
    target = await target_for()
    bias = {0: 100.0}
    stopped = await target.generate(logit_bias=bias, ignore_eos=False)
    assert stopped.tokens == [0]
    assert stopped.finished.finish_reason == types_pb2.FINISH_REASON_STOP
    assert len((await target.generate(logit_bias=bias, ignore_eos=True, max_tokens=5)).tokens) == 5


@pytest.mark.parametrize("mode", ["off", "ssd", "sd"])
async def test_stop_string_in_the_middle_of_accepted_tokens(target_for, speculator_for, mode):
    target = await target_for()
    options = {"temperature": 1.0, "max_tokens": 40}
    free = await target.generate(**options)
    speculator = await speculator_for(truth={(1, 2, 3): free.tokens})
    stop = free.text[17:20]
    got = await target.generate(mode=mode, speculator=speculator.endpoint, stop=[stop], **options)
    assert got.text == free.text[: free.text.index(stop)]
    assert got.tokens == free.tokens[: len(got.tokens)]
    assert got.finished.finish_reason == types_pb2.FINISH_REASON_STOP


@pytest.mark.parametrize("mode", ["ssd", "sd"])
@pytest.mark.parametrize("max_tokens", [1, 2, 3, 5, 6, 7])
async def test_max_tokens_is_exact(target_for, speculator_for, mode, max_tokens):
    target = await target_for("toy#vocab=24,seed=3,sharpness=2,step_ms=5")
    truth = (await target.generate(max_tokens=20)).tokens
    speculator = await speculator_for(truth={(1, 2, 3): truth})
    got = await target.generate(mode=mode, speculator=speculator.endpoint, max_tokens=max_tokens)
    assert got.tokens == truth[:max_tokens]
    assert got.finished.finish_reason == types_pb2.FINISH_REASON_LENGTH


@pytest.mark.parametrize("stop", [[], ["zz!"]])
async def test_continuation_repeats_nothing_but_unsent_text(target_for, stop):
    target = await target_for()
    options = {"temperature": 0.8, "frequency_penalty": 0.5, "max_tokens": 30, "stop": stop}
    whole = await target.generate(**options)
    rest = await target.generate(committed=whole.tokens[:12], num_text_chars_sent=7, **options)
    assert rest.tokens == whole.tokens[12:]
    assert rest.text == whole.text[7:]
    assert rest.finished.usage.num_completion_tokens == 30


@pytest.mark.parametrize("stop", [[], ["zz!"]])
async def test_continuation_leaves_out_text_that_the_client_has_of_later_tokens(target_for, stop):
    target = await target_for()
    options = {"temperature": 0.8, "frequency_penalty": 0.5, "max_tokens": 30, "stop": stop}
    whole = await target.generate(**options)
    rest = await target.generate(committed=whole.tokens[:6], num_text_chars_sent=17, **options)
    assert rest.tokens == whole.tokens[6:]
    assert rest.text == whole.text[17:]


@pytest.mark.parametrize("stop", [[], ["zz!"]])
async def test_continuation_says_how_much_text_its_tokens_had_brought(target_for, stop):
    """So a client that only counted its tokens can be given exactly the rest."""
    target = await target_for()
    options = {"temperature": 0.8, "frequency_penalty": 0.5, "max_tokens": 30, "stop": stop}
    num_tokens, num_chars, seen = 0, 0, []
    async for event in target.stub.RunSequence(target.message(**options)):
        num_tokens += len(event.delta.token_ids)
        num_chars += len(event.delta.text)
        seen.append((num_tokens, num_chars))
    whole = await target.generate(**options)
    for num_tokens, num_chars in [each for each in seen if 0 < each[0] < len(whole.tokens)]:
        rest = await target.generate(committed=whole.tokens[:num_tokens], **options)
        assert rest.started.num_committed_text_chars == num_chars
    assert not whole.started.HasField("num_committed_text_chars")


async def test_continuation_of_a_complete_output_only_finishes(target_for):
    target = await target_for()
    whole = await target.generate(max_tokens=10)
    rest = await target.generate(max_tokens=10, committed=whole.tokens, num_text_chars_sent=4)
    assert rest.tokens == []
    assert rest.text == whole.text[4:]
    assert rest.finished.finish_reason == types_pb2.FINISH_REASON_LENGTH


async def test_continuation_of_an_output_that_filled_the_context_only_finishes(target_for):
    target = await target_for(max_context=32)
    whole = await target.generate(max_tokens=100)
    assert whole.finished.finish_reason == types_pb2.FINISH_REASON_LENGTH
    rest = await target.generate(max_tokens=100, committed=whole.tokens, num_text_chars_sent=len(whole.text))
    assert (rest.tokens, rest.text) == ([], "")
    assert rest.finished.finish_reason == types_pb2.FINISH_REASON_LENGTH


async def test_drain_refuses_new_and_ends_running_after_the_grace(target_for):
    target = await target_for("toy#vocab=24,seed=3,step_ms=20")
    running = asyncio.create_task(target.generate(max_tokens=1000))
    await asyncio.sleep(0.2)
    drained = await target.stub.DrainTarget(target_pb2.DrainTargetRequest(grace_seconds=0.5))
    assert drained.num_sequences_running == 1
    assert (await target.status()).state == types_pb2.SERVING_STATE_DRAINING
    code, reason, message, _ = await refusal(target, target.message())
    assert (code, reason) == ("UNAVAILABLE", "DRAINING")
    assert message == "this target is draining and takes no new sequences"
    assert not running.done()
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await running
    assert isinstance(from_rpc_error(caught.value), Draining)


async def test_status_names_model_and_load(target_for, speculator_for):
    target = await target_for(id="pod-1", metrics_port=None)
    speculator = await speculator_for()
    await target.generate(mode="ssd", speculator=speculator.endpoint)
    status = await target.status()
    assert status.target.id == "pod-1"
    assert status.target.incarnation != 0
    assert status.target.endpoint == target.endpoint
    assert status.state == types_pb2.SERVING_STATE_SERVING
    assert (status.model.name, status.model.vocab_size, status.max_lookahead) == ("toy", 24, 4)
    assert len(status.model.tokenizer_fingerprint) == 64
    assert status.model.weights == "", "a toy has none"
    assert status.model.cuda_graphs == "off, since the device is cpu"
    assert status.num_steps > 0
    (link,) = status.speculators
    assert (link.endpoint, link.connected, link.transport) == (speculator.endpoint, True, "grpc")
    assert link.speculator.id == "fake"
    assert link.round_trip_ms > 0


async def test_status_counts_what_was_refused_by_reason(target_for):
    target = await target_for(max_context=64)
    refused = (target.message([1] * 100), target.message([1] * 100), target.message([99]))
    for message in refused:
        with pytest.raises(grpc.aio.AioRpcError):
            await target.run(message)
    counts = {count.reason: count.num_requests for count in (await target.status()).refusals}
    assert counts == {"CONTEXT_LENGTH_EXCEEDED": 2, "INVALID_ARGUMENT": 1}


async def test_metrics_are_exported(target_for, speculator_for, unused_tcp_port):
    target = await target_for(metrics_port=unused_tcp_port)
    truth = (await target.generate()).tokens
    speculator = await speculator_for(truth={(1, 2, 3): truth})
    await target.generate(mode="ssd", speculator=speculator.endpoint)
    await asyncio.sleep(0.1)
    url = f"http://127.0.0.1:{unused_tcp_port}/metrics"
    text = await asyncio.to_thread(lambda: urllib.request.urlopen(url).read().decode())
    values = dict(line.rsplit(" ", 1) for line in text.splitlines() if not line.startswith("#"))
    found = sum(
        float(values[f'specpool_speculation_lookups_total{{outcome="{kind}"}}'])
        for kind in ("hit", "partial", "late", "miss")
    )
    assert found > 0
    assert float(values['vllm:generation_tokens_total{model_name="toy"}']) == 80
    assert float(values['specpool_round_duration_seconds_count{phase="forward"}']) > 0
    assert float(values['vllm:num_requests_running{model_name="toy"}']) == 0


async def test_told_speculators_are_checked_where_they_enter(target_for):
    client = await target_for()
    good, bad = types_pb2.SpeculatorEndpoint(address="a:1"), types_pb2.SpeculatorEndpoint(address="nowhere")
    await client.stub.GetTargetStatus(target_pb2.GetTargetStatusRequest(speculators=[good]))
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await client.stub.GetTargetStatus(target_pb2.GetTargetStatusRequest(speculators=[good, bad]))
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    message = client.message()
    message.speculators.append(bad)
    with pytest.raises(grpc.aio.AioRpcError, match=r"speculators\.address must be HOST:PORT"):
        await client.run(message)


@pytest.mark.parametrize("grace_s", [math.nan, math.inf, -1.0, 1e300])
async def test_a_drain_of_no_time_that_there_is_is_refused_by_name(target_for, grace_s):
    client = await target_for()
    with pytest.raises(grpc.aio.AioRpcError, match="grace_seconds must be between 0 and") as caught:
        await client.stub.DrainTarget(target_pb2.DrainTargetRequest(grace_seconds=grace_s))
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert (await client.status()).state == types_pb2.SERVING_STATE_SERVING
