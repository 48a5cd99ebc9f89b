"""Models over a paged KV cache.

Import from the submodules, or these names from here:
`interface` (Segment, CausalModel), `paged_kv` (BlockPool, SequenceKV), `loading` (load_model),
`tokenizer` (load_tokenizer, tokenizer_fingerprint), `detokenizer` (IncrementalDetokenizer), `toy` (ToyModel).
"""

from __future__ import annotations

from specpool.modeling.interface import CausalModel, Segment
from specpool.modeling.loading import load_model
from specpool.modeling.paged_kv import BlockPool, SequenceKV
from specpool.modeling.spec import ModelSpec
from specpool.modeling.tokenizer import load_tokenizer, tokenizer_fingerprint
from specpool.modeling.toy import RandomModel, ToyModel, ToyTokenizer

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
