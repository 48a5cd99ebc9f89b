"""A fingerprint that tells whether two tokenizers are interchangeable."""

from __future__ import annotations

import hashlib
import json
from typing import Any


def tokenizer_fingerprint(tokenizer: Any) -> str:
    """Hash over the vocabulary and the special tokens: equal if and only if token ids mean the same on both sides.

    Args:
        tokenizer: has what tokenizers of `transformers` have: `get_vocab()`, `all_special_ids` and
            `all_special_tokens`.
    """
    vocabulary = sorted(tokenizer.get_vocab().items(), key=lambda item: item[1])
    special = sorted(zip(tokenizer.all_special_ids, map(str, tokenizer.all_special_tokens), strict=True))
    text = json.dumps([vocabulary, special], ensure_ascii=False, separators=(",", ":"))
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()
