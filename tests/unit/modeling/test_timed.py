"""Timed models: the logits of the toy of the same numbers, through forks and copies of block tables."""

from __future__ import annotations

import random

import pytest
import torch

from specpool.errors import InvalidArgument
from specpool_engine.modeling.interface import Segment
from specpool_engine.modeling.load_model import load_model
from specpool_engine.modeling.paged_kv import SequenceKV

OPTIONS = "vocab=24,seed=3,noise=0.4"


def test_a_timed_model_has_the_logits_of_its_toy_whatever_is_forked_or_chunked():
    draw = random.Random(5)
    models = [load_model(f"{kind}#{OPTIONS}", num_blocks=400, block_size=4) for kind in ("toy", "timed")]
    branches = [[SequenceKV(model.pool)] for model in models]
    for _ in range(60):
        chosen = draw.sample(range(len(branches[0])), k=min(3, len(branches[0])))
        sizes = [draw.randint(1, 7) for _ in chosen]
        tokens = [[draw.randrange(24) for _ in range(size)] for size in sizes]
        wanted = [draw.randint(0, size) for size in sizes]
        logits = [
            model.forward(
                [
                    Segment(kv=kvs[index], tokens=run, num_logits=num_logits)
                    for index, run, num_logits in zip(chosen, tokens, wanted, strict=True)
                ]
            )
            for model, kvs in zip(models, branches, strict=True)
        ]
        torch.testing.assert_close(logits[1], logits[0], rtol=0, atol=0)
        source = draw.randrange(len(branches[0]))
        cut = draw.randint(0, branches[0][source].length)
        for kvs in branches:
            kvs.append(kvs[source].fork(cut))
            if len(kvs) > 5:
                kvs.pop(1).free()


def test_a_timed_model_refuses_a_vocabulary_whose_table_would_be_too_large():
    with pytest.raises(InvalidArgument, match="at most 256 tokens"):
        load_model("timed#vocab=1000,seed=1")
