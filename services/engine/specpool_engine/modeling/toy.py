"""Hand-computable models: no weights, no downloads, microseconds per token, and a KV cache that is really checked.

A toy's logits are a seeded table indexed by the last two tokens. It stores token ids where a real model stores keys
and values, and reads the whole sequence back through the block table on every forward: a wrong block table, a missed
copy or a block reused too early gives wrong logits or fails the check against what the sequence must contain.

Shapes: V = vocabulary size.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Sequence

import torch
from torch import Tensor

from specpool.errors import InvalidArgument
from specpool_engine.modeling.interface import Segment, check_segments
from specpool_engine.modeling.paged_kv import BlockPool, SequenceKV, reserve_all

_EMPTY = -1


def _generator(*parts: int) -> torch.Generator:
    digest = hashlib.blake2b(repr(parts).encode(), digest_size=7).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "big"))


class ToyTable:
    """The known function: logits [V] for a pair (token before last, last token), computed on first use."""

    def __init__(self, vocab_size: int, seed: int, sharpness: float = 3.0) -> None:
        self.vocab_size = vocab_size
        self.seed = seed
        self.sharpness = sharpness
        self._rows: dict[tuple[int, int], Tensor] = {}

    def logits(self, before: int, last: int) -> Tensor:
        """Logits [V]; `before` is -1 at the start of a sequence."""
        row = self._rows.get((before, last))
        if row is None:
            generator = _generator(self.seed, before, last)
            row = torch.randn(self.vocab_size, generator=generator, dtype=torch.float32) * self.sharpness
            self._rows[before, last] = row
        return row


class DraftTable(ToyTable):
    """A table near the target's.

    It has the target's logits for a share `agreement` of all pairs, and its own for the rest. To all of them normal
    noise of deviation `noise` is added: such a draft errs as a smaller model does, seldom by much.
    """

    def __init__(self, target: ToyTable, *, agreement: float, draft_seed: int, noise: float = 0.0) -> None:
        super().__init__(target.vocab_size, draft_seed, target.sharpness)
        self.target = target
        self.agreement = agreement
        self.noise = noise

    def logits(self, before: int, last: int) -> Tensor:
        """Logits [V] of the draft for a pair of tokens."""
        pair = (before, last)
        if pair not in self._rows:
            agrees = torch.rand((), generator=_generator(self.seed, *pair, 1)).item() < self.agreement
            row = self.target.logits(before, last) if agrees else super().logits(before, last)
            if self.noise:
                row = row + self.noise * torch.randn(self.vocab_size, generator=_generator(self.seed, *pair, 2))
            self._rows[pair] = row
        return self._rows[pair]


class ToyModel:
    """A `CausalModel` whose logits are those of a `ToyTable`, and whose KV cache holds token ids."""

    def __init__(
        self,
        table: ToyTable,
        pool: BlockPool,
        *,
        max_context: int = 4096,
        step_ms: float = 0.0,
        row_ms: float = 0.0,
    ) -> None:
        self.table = table
        self.vocab_size = table.vocab_size
        self.max_context = max_context
        self.pool = pool
        self.device = torch.device("cpu")
        self.step_ms = step_ms
        self.row_ms = row_ms
        self.num_forwards = 0
        self.num_tokens = 0
        # Contents of every slot: (token, position), where a real model has keys and values.
        self._slots = torch.full((pool.num_blocks, pool.block_size, 2), _EMPTY, dtype=torch.long)

    def forward(self, segments: Sequence[Segment]) -> Tensor:
        """Logits [sum of num_logits, V], after checking that every block table leads to the sequence's own tokens."""
        check_segments(segments, max_context=self.max_context, vocab_size=self.vocab_size)
        reserve_all(self.pool, ((segment.kv, len(segment.tokens)) for segment in segments))
        sources, destinations = self.pool.take_copies()
        if destinations:
            self._slots[destinations] = self._slots[sources]
        for segment in segments:
            self._write(segment)
        rows = [row for segment in segments for row in self._read(segment)]
        for segment in segments:
            segment.kv.advance(len(segment.tokens))
        self._spend_time(segments)
        return torch.stack(rows) if rows else torch.empty(0, self.vocab_size)

    def _write(self, segment: Segment) -> None:
        size, kv = self.pool.block_size, segment.kv
        for position, token in enumerate(segment.tokens, start=kv.length):
            block = kv.block_ids[position // size]
            assert self.pool.references(block) == 1, f"write into block {block}, which is shared or free"
            self._slots[block, position % size] = torch.tensor([token, position])

    def _read(self, segment: Segment) -> list[Tensor]:
        end = segment.kv.length + len(segment.tokens)
        contents = self.tokens_of(segment.kv, end)
        if segment.num_logits == 0:
            return []
        return [
            self.table.logits(contents[position - 1] if position else _EMPTY, contents[position])
            for position in range(end - segment.num_logits, end)
        ]

    def tokens_of(self, kv: SequenceKV, length: int | None = None) -> list[int]:
        """The tokens found through a block table; fails if a slot belongs to another position or is empty."""
        length = kv.length if length is None else length
        flat = self._slots[kv.block_ids].view(-1, 2)[:length]
        assert flat[:, 1].tolist() == list(range(length)), f"block table reads wrong slots: {flat.tolist()}"
        tokens: list[int] = flat[:, 0].tolist()
        return tokens

    def _spend_time(self, segments: Sequence[Segment]) -> None:
        self.num_forwards += 1
        num_tokens = sum(len(segment.tokens) for segment in segments)
        self.num_tokens += num_tokens
        wait_ms = self.step_ms + self.row_ms * num_tokens
        if wait_ms > 0:
            time.sleep(wait_ms / 1e3)


class RandomModel(ToyModel):
    """A draft of no quality: one pseudo-random token, a function of (last token, position), gets all the weight."""

    def __init__(self, vocab_size: int, pool: BlockPool, *, max_context: int, seed: int = 0) -> None:
        super().__init__(ToyTable(vocab_size, seed), pool, max_context=max_context)

    def _read(self, segment: Segment) -> list[Tensor]:
        start = segment.kv.length + len(segment.tokens) - segment.num_logits
        tokens = segment.tokens[len(segment.tokens) - segment.num_logits :]
        return [self._row(token, position) for position, token in enumerate(tokens, start=start)]

    def _row(self, last: int, position: int) -> Tensor:
        generator = _generator(self.table.seed, last, position)
        row = torch.rand(self.vocab_size, generator=generator)
        row[int(torch.randint(self.vocab_size, (), generator=generator))] = 10.0
        return row


class ToyTokenizer:
    """Character-level tokenizer for toy models: token 0 is the end token, others are printable characters.

    It has the part of the interface of `transformers` tokenizers that the services use.
    """

    eos_token_id = 0
    bos_token_id = None
    chat_template = None
    all_special_ids = (0,)
    all_special_tokens = ("<end>",)

    def __init__(self, vocab_size: int) -> None:
        if vocab_size < 2:
            raise InvalidArgument(f"a toy vocabulary needs at least 2 tokens, got {vocab_size}")
        self.vocab_size = vocab_size
        # Lower-case letters first, so that small vocabularies can spell words; then the rest, then CJK.
        ascii_characters = "abcdefghijklmnopqrstuvwxyz .,\n0123456789" + "".join(
            chr(code) for code in range(33, 127) if chr(code) not in "abcdefghijklmnopqrstuvwxyz.,0123456789"
        )
        characters = ascii_characters + "".join(
            chr(0x4E00 + index) for index in range(max(0, vocab_size - 1 - len(ascii_characters)))
        )
        self._characters = ["<end>", *characters[: vocab_size - 1]]
        self._ids = {character: index for index, character in enumerate(self._characters)}

    def __len__(self) -> int:
        return self.vocab_size

    def get_vocab(self) -> dict[str, int]:
        """The vocabulary: token text to id."""
        return dict(self._ids)

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """One token per character; a character outside the vocabulary wraps around to some token."""
        del add_special_tokens
        return [self._ids.get(c) or 1 + ord(c) % (self.vocab_size - 1) for c in text]

    def decode(self, token_ids: Sequence[int], skip_special_tokens: bool = False) -> str:
        """The characters of the tokens, with or without the end token."""
        return "".join(self._characters[t] for t in token_ids if t or not skip_special_tokens)

    def convert_ids_to_tokens(self, token_ids: Sequence[int]) -> list[str]:
        """The text of each token."""
        return [self._characters[token] for token in token_ids]

    def apply_chat_template(
        self,
        conversation: Sequence[dict[str, str]],
        add_generation_prompt: bool = True,
        tokenize: bool = False,
    ) -> str | list[int]:
        """The contents of the messages, one per line, as text or as tokens."""
        text = "\n".join(message["content"] for message in conversation)
        text += "\n" if add_generation_prompt else ""
        return self.encode(text) if tokenize else text
