"""Tokenizers of models, and a fingerprint that tells whether two of them are interchangeable."""

from __future__ import annotations

from typing import Any

from specpool.speculation.fingerprint import tokenizer_fingerprint
from specpool_engine.modeling.files import Progress, no_progress, resolve_model_directory
from specpool_engine.modeling.spec import ModelKind, ModelSpec
from specpool_engine.modeling.toy import ToyTokenizer

__all__ = ["load_tokenizer", "tokenizer_fingerprint"]


def load_tokenizer(spec: ModelSpec | str, *, on_progress: Progress = no_progress) -> Any:
    """The tokenizer of a model: a `transformers` one, or a `ToyTokenizer` with the same methods."""
    spec = ModelSpec.parse(spec) if isinstance(spec, str) else spec
    if spec.kind in (ModelKind.TOY, ModelKind.TIMED):
        return ToyTokenizer(spec.integer("vocab", 64, minimum=2) or 64)
    if spec.kind is ModelKind.RANDOM:
        return load_tokenizer(spec.source, on_progress=on_progress)
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(resolve_model_directory(spec.source, on_progress))
