"""Models over a paged KV cache.

Import from the submodules, or these names from here:
`interface` (Segment, CausalModel), `paged_kv` (BlockPool, SequenceKV), `loading` (load_model),
`tokenizer` (load_tokenizer, tokenizer_fingerprint), `detokenizer` (IncrementalDetokenizer), `toy` (ToyModel).
"""

from __future__ import annotations

from specpool_engine.modeling.interface import CausalModel, Segment
from specpool_engine.modeling.load_model import load_model
from specpool_engine.modeling.paged_kv import BlockPool, SequenceKV
from specpool_engine.modeling.spec import ModelSpec
from specpool_engine.modeling.tokenizer import load_tokenizer, tokenizer_fingerprint
from specpool_engine.modeling.toy import RandomModel, ToyModel, ToyTokenizer

__all__ = [
    "BlockPool",
    "CausalModel",
    "ModelSpec",
    "RandomModel",
    "Segment",
    "SequenceKV",
    "ToyModel",
    "ToyTokenizer",
    "load_model",
    "load_tokenizer",
    "tokenizer_fingerprint",
]
