"""Small tokenizers of the kinds that models have, built here: what they do to characters is what matters."""

from __future__ import annotations

from itertools import pairwise

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

END = "<end>"
_WORDS = "the cat sat on mat hello world"


def byte_level(end: str = END) -> PreTrainedTokenizerFast:
    """Byte-level BPE with no merges: every byte is a token, so characters are split as badly as possible."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    return _byte_level(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]), end)


def byte_level_merged() -> PreTrainedTokenizerFast:
    """Byte-level BPE whose merges go across characters: tokens begin and end within them."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {c: i for i, c in enumerate(alphabet)}
    merges = []
    for text in ("你好", "好你", "🫨🫨", "éé", "a€", " the", " cat"):
        symbols = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False).pre_tokenize_str(text)[0][0]
        for left, right in pairwise(symbols[1:]):
            if left + right not in vocab:
                vocab[left + right] = len(vocab)
                merges.append((left, right))
    return _byte_level(models.BPE(vocab=vocab, merges=merges), END)


def _byte_level(model: models.BPE, end: str) -> PreTrainedTokenizerFast:
    backend = Tokenizer(model)
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=end)


def byte_fallback(*, strips_first_space: bool = True) -> PreTrainedTokenizerFast:
    """What Llama 2, Mistral, Phi-3 (with a first space added and stripped), Gemma have: the unknown is bytes."""
    vocab = {"<unk>": 0, "<s>": 1} | {f"<0x{byte:02X}>": 2 + byte for byte in range(256)}
    merges = []
    for character in "▁" + "".join(sorted(set(_WORDS) - {" "})) + "你é":
        vocab[character] = len(vocab)
    for word in _WORDS.split():
        for end in range(1, len(word) + 1):
            left, right = ("▁" + word)[:end], word[end - 1]
            if left + right not in vocab:
                vocab[left + right] = len(vocab)
                merges.append((left, right))
    backend = Tokenizer(models.BPE(vocab=vocab, merges=merges, byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    steps = [normalizers.Prepend("▁")] if strips_first_space else []
    backend.normalizer = normalizers.Sequence([*steps, normalizers.Replace(" ", "▁")])
    strip = [decoders.Strip(" ", 1, 0)] if strips_first_space else []
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *strip])
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=END, bos_token="<s>", unk_token="<unk>")


def metaspace(characters: str) -> PreTrainedTokenizerFast:
    """SentencePiece's unigram model without bytes: knows `characters`, marks the beginnings of words."""
    pieces = ["▁", *sorted(set(characters) - {"▁", " "}), *("▁" + word for word in _WORDS.split())]
    vocab = [("<unk>", 0.0), *((piece, -float(2 + (len(piece) == 1))) for piece in pieces)]
    backend = Tokenizer(models.Unigram(vocab, unk_id=0))
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.decoder = decoders.Metaspace()
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=END, unk_token="<unk>")
