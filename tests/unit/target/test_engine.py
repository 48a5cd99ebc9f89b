"""The engine on the toy model, without speculators."""

from __future__ import annotations

import asyncio
import math
import threading

import pytest
import torch

from specpool.errors import ContextLengthExceeded, EngineFailed, FollowerLost, TargetUnavailable
from specpool_target.engine.sequence import FinishReason

GREEDY = {"temperature": 0.0}
SAMPLED = {"temperature": 0.9, "seed": 41}


@pytest.mark.parametrize(
    "sampling",
    [
        GREEDY,
        SAMPLED,
        {"temperature": 1.3, "seed": -5, "top_p": 0.8},
        {"temperature": 1.0, "seed": 2**62, "top_k": 5, "min_p": 0.05},
        GREEDY | {"repetition_penalty": 1.8},
        SAMPLED | {"presence_penalty": 1.0, "frequency_penalty": 0.7},
        SAMPLED | {"logit_bias": {3: 4.0, 4: -100.0}},
    ],
    ids=["greedy", "sampled", "top-p", "top-k", "repetition", "presence", "bias"],
)
async def test_output_is_that_of_plain_decoding(bench_for, request_for, sampling):
    bench = bench_for()
    request = request_for("a", [1, 2, 3], max_tokens=40, **sampling)
    result = await bench.run(request)
    assert result.tokens == bench.decode([1, 2, 3], request.sampling)
    assert result.reason is FinishReason.LENGTH


async def test_batched_sequences_do_not_disturb_one_another(bench_for, request_for):
    bench = bench_for(max_batch_size=5, max_batch_tokens=16, num_blocks=256)
    kinds = [GREEDY, SAMPLED, {"temperature": 0.5, "seed": 9}, GREEDY | {"frequency_penalty": 1.0}]
    requests = [
        request_for(f"s{i}", [(i * 7 + j) % 24 for j in range(3 + 5 * i)], max_tokens=10 + i, **kinds[i % 4])
        for i in range(12)
    ]
    results = await asyncio.gather(*(bench.run(r) for r in requests))
    for request, result in zip(requests, results, strict=True):
        assert result.tokens == bench.decode(request.prompt_tokens, request.sampling), request.id


async def test_preemption_in_a_tiny_pool_loses_nothing(bench_for, request_for):
    bench = bench_for(num_blocks=12, block_size=4, max_batch_size=6)
    requests = [request_for(f"s{i}", [i, i + 1, i + 2], max_tokens=30, **SAMPLED) for i in range(6)]
    results = await asyncio.gather(*(bench.run(r) for r in requests))
    for request, result in zip(requests, results, strict=True):
        assert result.tokens == bench.decode(request.prompt_tokens, request.sampling)
    await bench.idle()
    preemptions = bench.engine.metrics.registry.get_sample_value("vllm:num_preemptions_total", {"model_name": "toy"})
    assert preemptions > 0, "the pool was meant to be too small"
    assert bench.pool.num_free == 12


async def test_prompt_is_prefilled_in_chunks(bench_for, request_for):
    bench = bench_for(max_batch_tokens=8)
    prompt = [j % 24 for j in range(50)]
    before = bench.model.num_forwards
    result = await bench.run(request_for("a", prompt, max_tokens=1))
    assert result.tokens == bench.decode(prompt, request_for("a", prompt, max_tokens=1).sampling)
    assert bench.model.num_forwards - before == math.ceil(50 / 8)


async def test_prefix_is_reused_within_a_tenant_only(bench_for, request_for):
    from dataclasses import replace

    bench = bench_for()
    prompt = [j % 24 for j in range(21)]
    salts = [b"one", b"one", b"two"]
    cached = []
    for index, salt in enumerate(salts):
        request = replace(request_for(f"s{index}", prompt, max_tokens=5), cache_salt=salt)
        result = await bench.run(request)
        assert result.tokens == bench.decode(prompt, request.sampling)
        cached.append(result.finish.num_cached_prompt_tokens)
    assert cached == [0, 20, 0]
    load = bench.engine.load()
    assert (load.num_prefix_cache_queried_tokens, load.num_prefix_cache_hit_tokens) == (3 * 21, 20)


async def test_stop_token_ends_the_output_and_belongs_to_it(bench_for, request_for):
    bench = bench_for()
    free = bench.decode([1, 2], request_for("x", [1, 2], max_tokens=40, **SAMPLED).sampling)
    stop = free[11]
    result = await bench.run(request_for("a", [1, 2], max_tokens=40, stop_token_ids=(stop,), **SAMPLED))
    assert result.tokens == free[: free.index(stop) + 1]
    assert result.reason is FinishReason.STOP


async def test_stop_string_across_tokens_is_not_part_of_the_text(bench_for, request_for):
    from specpool_engine.modeling.toy import ToyTokenizer

    bench = bench_for()
    free = bench.decode([1, 2], request_for("x", [1, 2], max_tokens=40, **SAMPLED).sampling)
    text = ToyTokenizer(24).decode(free, skip_special_tokens=True)
    stop = text[9:12]
    result = await bench.run(request_for("a", [1, 2], max_tokens=40, stop=(stop,), **SAMPLED))
    assert result.text == text[: text.index(stop)]
    assert ToyTokenizer(24).decode(result.tokens, skip_special_tokens=True) == result.text + stop
    assert result.reason is FinishReason.STOP


async def test_text_held_back_for_a_stop_string_comes_at_the_end(bench_for, request_for):
    from specpool_engine.modeling.toy import ToyTokenizer

    bench = bench_for()
    free = bench.decode([1, 2], request_for("x", [1, 2], max_tokens=15, **SAMPLED).sampling)
    text = ToyTokenizer(24).decode(free, skip_special_tokens=True)
    result = await bench.run(request_for("a", [1, 2], max_tokens=15, stop=(text[-1] + "never",), **SAMPLED))
    assert result.text == text
    assert result.reason is FinishReason.LENGTH


async def test_logprobs_are_those_of_the_unmodified_distribution(bench_for, request_for):
    bench = bench_for()
    request = request_for("a", [1, 2], max_tokens=6, num_logprobs=3, logit_bias={5: 9.0}, **SAMPLED)
    result = await bench.run(request)
    tokens = [1, 2]
    assert len(result.tokens) == 6
    for token, got in zip(result.tokens, result.logprobs, strict=True):
        expected = bench.table.logits(tokens[-2], tokens[-1]).log_softmax(0)
        assert got.token_id == token
        assert got.chosen == pytest.approx(float(expected[token]), abs=1e-5)
        top = torch.topk(expected, 3)
        assert [t for t, _ in got.top] == top.indices.tolist()
        assert [v for _, v in got.top] == pytest.approx(top.values.tolist(), abs=1e-5)
        tokens.append(token)


async def test_continuation_goes_on_as_the_first_target_would_have(bench_for, request_for):
    from dataclasses import replace

    bench = bench_for()
    whole = request_for("a", [1, 2, 3], max_tokens=30, frequency_penalty=0.6, **SAMPLED)
    expected = bench.decode([1, 2, 3], whole.sampling)
    rest = await bench.run(replace(whole, id="b", committed_tokens=tuple(expected[:13])))
    assert rest.tokens == expected[13:]


async def test_output_ends_at_the_context(bench_for, request_for):
    bench = bench_for(context=16)
    result = await bench.run(request_for("a", [1, 2, 3], max_tokens=100))
    assert len(result.tokens) == 13
    assert result.reason is FinishReason.LENGTH


async def test_output_ends_when_one_sequence_fills_the_whole_cache(bench_for, request_for):
    bench = bench_for(num_blocks=4, block_size=4)
    result = await bench.run(request_for("a", [1, 2, 3], max_tokens=100))
    assert len(result.tokens) == 13
    await bench.idle()
    assert bench.pool.num_free == 4


async def test_prompt_that_can_never_fit_is_refused_with_numbers(bench_for, request_for):
    bench = bench_for(context=64, num_blocks=8, block_size=4)
    with pytest.raises(ContextLengthExceeded) as context:
        bench.submit(request_for("a", [1] * 64))
    assert str(context.value) == "prompt of 64 tokens leaves no room for output in the context of 64 tokens"
    with pytest.raises(ContextLengthExceeded) as cache:
        bench.submit(request_for("a", [1] * 40))
    assert str(cache.value) == "prompt of 40 tokens needs 11 KV blocks of 4 tokens, the cache has 8"


async def test_full_waiting_queue_is_refused(bench_for, request_for):
    bench = bench_for(max_batch_size=1, max_waiting=2)
    bench.model.step_ms = 20
    updates = [bench.submit(request_for(f"s{i}", [1, 2], max_tokens=50)) for i in range(3)]
    await asyncio.sleep(0.2)
    with pytest.raises(TargetUnavailable) as error:
        bench.submit(request_for("more", [1, 2]))
    assert error.value.reason == "TARGET_OVERLOADED"
    assert str(error.value) == "2 sequences are waiting already, at most 2 may"
    del updates


async def test_cancellation_frees_every_block(bench_for, request_for):
    bench = bench_for(max_batch_size=2)
    bench.model.step_ms = 5
    streams = {f"s{i}": bench.submit(request_for(f"s{i}", [i] * 9, max_tokens=200)) for i in range(4)}
    await streams["s0"].get()
    assert bench.pool.num_used > 0
    for name in streams:
        bench.engine.cancel(name)
    await bench.idle()
    assert bench.pool.num_used == 0
    assert bench.engine.num_sequences == 0


async def test_failure_of_the_model_ends_every_sequence_with_a_typed_error(bench_for, request_for):
    bench = bench_for()
    bench.model.step_ms = 5
    updates = bench.submit(request_for("a", [1, 2], max_tokens=100))
    await updates.get()

    def broken(segments):
        raise RuntimeError("no memory")

    bench.model.forward = broken
    result = await bench.collect(updates)
    assert isinstance(result.error, EngineFailed)
    assert str(result.error) == "the target engine failed: RuntimeError: no memory"
    with pytest.raises(EngineFailed):
        bench.submit(request_for("b", [1, 2]))


async def test_an_idle_engine_ends_when_its_model_is_lost(bench_for, request_for):
    bench = bench_for()
    await bench.run(request_for("a", [1, 2, 3]))
    bench.engine.thread.abort(FollowerLost("rank 1 is gone"))
    await asyncio.to_thread(bench.engine.thread.join, 10)
    assert isinstance(bench.engine.failure, FollowerLost)
    with pytest.raises(FollowerLost, match="rank 1 is gone"):
        bench.submit(request_for("b", [1, 2, 3]))


async def test_failure_reaches_sequences_that_were_still_in_the_queue(bench_for, request_for):
    bench = bench_for()
    updates = bench.submit(request_for("a", [1, 2], max_tokens=100))
    await updates.get()
    entered, released = threading.Event(), threading.Event()

    def broken(segments):
        entered.set()
        released.wait(5)
        raise RuntimeError("no memory")

    bench.model.forward = broken
    assert await asyncio.to_thread(entered.wait, 5)
    late = [bench.submit(request_for(name, [1, 2])) for name in ("b", "c")]
    released.set()
    for queue in (updates, *late):
        result = await asyncio.wait_for(bench.collect(queue), 5)
        assert isinstance(result.error, EngineFailed)


async def test_a_burst_during_one_forward_counts_as_waiting(bench_for, request_for):
    bench = bench_for(max_batch_size=1, max_waiting=2)
    bench.model.step_ms = 300
    await asyncio.sleep(0.05)
    kept = [bench.submit(request_for("running", [1, 2], max_tokens=5))]
    await asyncio.sleep(0.1)
    kept += [bench.submit(request_for(f"s{i}", [1, 2], max_tokens=5)) for i in range(2)]
    with pytest.raises(TargetUnavailable, match="2 sequences are waiting already, at most 2 may"):
        bench.submit(request_for("more", [1, 2]))
    for name in ("running", "s0", "s1"):
        bench.engine.cancel(name)
    await bench.idle()
    del kept
