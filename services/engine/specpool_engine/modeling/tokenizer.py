"""Tokenizers of models, and a fingerprint that tells whether two of them are interchangeable."""

from __future__ import annotations

import hashlib
import json
from typing import Any

from specpool_engine.modeling.files import Progress, no_progress, resolve_model_directory
from specpool_engine.modeling.spec import ModelKind, ModelSpec
from specpool_engine.modeling.toy import ToyTokenizer


def load_tokenizer(spec: ModelSpec | str, *, on_progress: Progress = no_progress) -> Any:
    """The tokenizer of a model: a `transformers` one, or a `ToyTokenizer` with the same methods."""
    spec = ModelSpec.parse(spec) if isinstance(spec, str) else spec
    if spec.kind is ModelKind.TOY:
        return ToyTokenizer(spec.integer("vocab", 64, minimum=2) or 64)
    if spec.kind is ModelKind.RANDOM:
        return load_tokenizer(spec.source, on_progress=on_progress)
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(resolve_model_directory(spec.source, on_progress))


def tokenizer_fingerprint(tokenizer: Any) -> str:
    """Hash over the vocabulary and the special tokens: equal if and only if token ids mean the same on both sides."""
    vocabulary = sorted(tokenizer.get_vocab().items(), key=lambda item: item[1])
    special = sorted(zip(tokenizer.all_special_ids, map(str, tokenizer.all_special_tokens), strict=True))
    text = json.dumps([vocabulary, special], ensure_ascii=False, separators=(",", ":"))
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()
