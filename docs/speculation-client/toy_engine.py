"""A toy engine on the pool: greedy decoding that verifies what speculators draft.

Usage: specpool speculator --model 'toy#vocab=32,seed=1' --listen 127.0.0.1:7300 & python toy_engine.py 127.0.0.1:7300
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Sequence

from specpool.discovery.directory import parse
from specpool.speculation import PoolIdentity, SpeculationPool, tokenizer_fingerprint, worth_waiting
from specpool.v1.types_pb2 import ModelInfo, Peer, SamplingParams

Model = Callable[[Sequence[int], int], list[int]]  # (tokens, n) -> the next token after each of the last n


def toy_model(vocab: int, seed: int) -> tuple[Model, object]:
    """A model that the toy speculator guesses well, and its tokenizer. Yours comes here."""
    from specpool_engine.modeling.toy import ToyTable, ToyTokenizer

    table = ToyTable(vocab, seed)

    def forward(tokens: Sequence[int], n: int) -> list[int]:
        time.sleep(0.01)  # as long as a real one takes at least: meanwhile speculators draft
        ends = range(len(tokens) - n + 1, len(tokens) + 1)
        return [int(table.logits(tokens[end - 2] if end > 1 else -1, tokens[end - 1]).argmax()) for end in ends]

    return forward, ToyTokenizer(vocab)


def connect(directory: str, tokenizer: object, vocab: int) -> SpeculationPool:
    """The pool of the speculators that a directory names: static:HOST:PORT,... or dns:NAME:PORT."""
    model = ModelInfo(name="toy", vocab_size=vocab, tokenizer_fingerprint=tokenizer_fingerprint(tokenizer))
    pool = SpeculationPool(parse(directory, field="directory"), PoolIdentity(peer=Peer(id="toy"), model=model))
    pool.start()
    pool.wait_settled(5.0)
    return pool


def generate(pool: SpeculationPool, forward: Model, prompt: Sequence[int], max_tokens: int) -> tuple[list[int], int]:
    """The output, and how many forwards it took."""
    tokens, draft, num_forwards = list(prompt), [], 0
    handle = pool.open(tokens, SamplingParams(temperature=0, max_tokens=max_tokens))
    while len(tokens) < len(prompt) + max_tokens:
        truth = forward([*tokens, *draft], len(draft) + 1)  # the first round is the prefill: no draft
        num_forwards += 1
        accepted = next((i for i, token in enumerate(draft) if token != truth[i]), len(draft))
        tokens += truth[: accepted + 1]
        draft = list(handle.next(accepted, truth[accepted]).tokens)  # a hit is a lookup: nothing is waited for
        depth = 0 if draft else worth_waiting(handle, 4, round_s=0.1)  # a miss: is a draft worth a wait?
        if depth and handle.request(depth, deadline_s=0.05):
            draft = list(handle.wait(0.1))
        handle.started(draft)
    handle.close()
    return tokens[len(prompt) : len(prompt) + max_tokens], num_forwards


if __name__ == "__main__":
    model, vocabulary = toy_model(32, seed=1)
    speculators = connect(f"static:{sys.argv[1]}", vocabulary, 32)
    print("tokens, number of forwards:", *generate(speculators, model, [1, 2, 3], 200))
    speculators.close()
