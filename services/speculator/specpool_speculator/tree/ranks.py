"""From the draft's logits to ranked tokens, for the nodes of many sequences at once.

Shapes: N = nodes of the step, V = vocabulary of the draft model, V' = of the target.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from specpool.algorithm.calibration import RankCalibration
from specpool.algorithm.draft_distribution import SparseDistribution
from specpool.algorithm.draft_ranks import DraftRanks, draft_ranks
from specpool.algorithm.sampling import process_logits
from specpool.algorithm.verification import VerificationMode
from specpool_speculator.dense.dense_rows import DenseRow, RowMemory
from specpool_speculator.tree.node import Node, NodeRanks, TokenDistribution
from specpool_speculator.tree.sequence import SequenceState


class RanksNodes(Protocol):
    """What turns the logits of a step into ranked tokens."""

    def rank(self, logits: Tensor, rows: Sequence[tuple[SequenceState, Node]]) -> list[NodeRanks]:
        """Ranks of N nodes from logits [N, V]."""
        ...


@dataclass(kw_only=True, slots=True)
class Ranker:
    """Ranks the next tokens after nodes."""

    num_ranks: int
    """Number of ranks kept per node."""
    saguaro_constant: float
    """Constant C of Saguaro sampling, for rejection verification; 1 is off."""
    num_kept: int
    """Number m of most likely tokens that the draft samples from, for rejection verification."""
    calibrations: Mapping[VerificationMode, RankCalibration]
    """How scores become probabilities, by verification mode."""
    dense_dtype: torch.dtype
    """Type that dense distributions are held and sent in, for rejection verification."""
    row_memory: RowMemory
    """Bounds the dense distributions; beyond it they are sparse."""

    def rank(self, logits: Tensor, rows: Sequence[tuple[SequenceState, Node]]) -> list[NodeRanks]:
        """Ranks of N nodes from logits [N, V]."""
        groups: dict[tuple[VerificationMode, int, int, bool], list[int]] = defaultdict(list)
        for index, (sequence, _) in enumerate(rows):
            options = sequence.options
            fan_out = max(sequence.spread.fan_out[0], 1) if options.verification is VerificationMode.REJECTION else 0
            groups[options.verification, options.vocab_size, fan_out, sequence.is_dense].append(index)
        ranks: dict[int, NodeRanks] = {}
        for (mode, vocab_size, fan_out, is_dense), indices in groups.items():
            group = [rows[index] for index in indices]
            selected = logits if len(groups) == 1 else logits[indices]
            scores = process_rows(selected[:, :vocab_size], group)
            ranks.update(zip(indices, self._rank_group(scores, mode, fan_out, group, is_dense), strict=True))
        return [ranks[index] for index in range(len(rows))]

    def _rank_group(
        self,
        scores: Tensor,
        mode: VerificationMode,
        fan_out: int,
        group: Sequence[tuple[SequenceState, Node]],
        is_dense: bool,
    ) -> Iterable[NodeRanks]:
        device = scores.device
        is_dense = is_dense and self.row_memory.has_room(scores.numel() * self.dense_dtype.itemsize)
        ranks = draft_ranks(
            scores,
            mode,
            min(self.num_ranks, scores.shape[1]),
            seed=torch.tensor([sequence.options.seed for sequence, _ in group], device=device),
            positions=torch.tensor([node.position + 1 for _, node in group], device=device),
            saguaro_fan_out=fan_out,
            saguaro_constant=self.saguaro_constant,
            num_kept=self.num_kept,
            dense_dtype=self.dense_dtype if is_dense else None,
        )
        with_distribution = [sequence.options.sends_distributions for sequence, _ in group]
        return self._unbind(ranks, self.calibrations[mode], with_distribution)

    def _unbind(
        self, ranks: DraftRanks, calibration: RankCalibration, with_distribution: Sequence[bool]
    ) -> Iterable[NodeRanks]:
        drafted = [_possible(row) for row in ranks.token_ids.tolist()]
        same = ranks.bonus_ids is ranks.token_ids
        bonus = drafted if same else [_possible(row) for row in ranks.bonus_ids.tolist()]
        distributions = self._distributions(ranks, drafted, with_distribution)
        if ranks.scores is None:
            return [NodeRanks(*of_node) for of_node in zip(drafted, bonus, distributions, strict=True)]
        scores = ranks.scores.cpu().numpy()
        rows = zip(drafted, bonus, distributions, scores.tolist(), calibration.of_rows(scores).tolist(), strict=True)
        return [
            NodeRanks(d, b, of, tuple(s), tuple(p))
            if len(d) == len(s)
            else NodeRanks(d, b, of, tuple(s[: len(d)]), tuple(p[: len(d)]))
            for d, b, of, s, p in rows
        ]

    def _distributions(
        self, ranks: DraftRanks, drafted: Sequence[Sequence[int]], with_distribution: Sequence[bool]
    ) -> Sequence[TokenDistribution | DenseRow | None]:
        distribution = ranks.distribution
        if distribution is None:
            return [
                TokenDistribution((row[0],), (1.0,)) if wanted else None
                for row, wanted in zip(drafted, with_distribution, strict=True)
            ]
        if isinstance(distribution, SparseDistribution):
            rows = zip(distribution.token_ids.tolist(), distribution.probabilities.tolist(), strict=True)
            return [TokenDistribution(tuple(ids), tuple(values)) for ids, values in rows]
        return [DenseRow(row, self.row_memory) for row in distribution.probabilities]


def process_rows(logits: Tensor, rows: Sequence[tuple[SequenceState, Node]]) -> Tensor:
    """Apply penalties, bias, temperature and masks of each row's request; [N, V'] to [N, V']."""
    if all(_is_plain(sequence) for sequence, _ in rows):
        return logits
    by_sequence: dict[int, list[int]] = defaultdict(list)
    for index, (sequence, _) in enumerate(rows):
        by_sequence[id(sequence)].append(index)
    processed = torch.empty_like(logits)
    for indices in by_sequence.values():
        sequence = rows[indices[0]][0]
        processed[indices] = process_logits(
            logits[indices],
            sequence.options.sampling,
            prompt_tokens=sequence.tree.tokens[: sequence.options.num_prompt_tokens],
            output_tokens=sequence.tree.tokens[sequence.options.num_prompt_tokens :],
            row_suffixes=[_tokens_below_root(rows[index][1]) for index in indices],
        )
    return processed


def _is_plain(sequence: SequenceState) -> bool:
    sampling = sequence.options.sampling
    return not sampling.changes_logits and sampling.temperature in (0, 1)


def _tokens_below_root(node: Node) -> list[int]:
    tokens: list[int] = []
    while node.parent is not None:
        tokens.append(node.token)
        node = node.parent
    return tokens[::-1]


def _possible(row: Sequence[int]) -> tuple[int, ...]:
    """The tokens of a row without the -1 at its end."""
    return tuple(row) if not row or row[-1] >= 0 else tuple(token for token in row if token >= 0)
