"""What goes wrong with one sequence ends that sequence, and its target hears of it; the others are drafted for."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from specpool.errors import InvalidArgument
from specpool.v1 import speculator_pb2
from specpool_speculator.engine import scheduler
from specpool_speculator.engine.drafter import Drafter
from specpool_speculator.tree.draft_tree import DraftTree, Work
from specpool_speculator.tree.ranks import Ranker

from .conftest import ScriptedTarget, make_drafter

Inject = Callable[[pytest.MonkeyPatch, Drafter], None]


def broken_for_bad(whole, is_bad):
    def call(*arguments, **options):
        if is_bad(*arguments, **options):
            raise ValueError("broken")
        return whole(*arguments, **options)

    return call


def in_scheduling(patch, drafter):
    whole = scheduler.branch_candidates
    patch.setattr(scheduler, "branch_candidates", broken_for_bad(whole, lambda s: s.key[1] == "bad"))


def in_ranking(patch, drafter):
    whole = Ranker.rank
    is_bad = lambda self, logits, rows: any(sequence.key[1] == "bad" for sequence, _ in rows)  # noqa: E731
    patch.setattr(Ranker, "rank", broken_for_bad(whole, is_bad))


def in_publishing(patch, drafter):
    bad = next(sequence.tree for sequence in drafter.held if sequence.key[1] == "bad")
    patch.setattr(DraftTree, "publish", broken_for_bad(DraftTree.publish, lambda tree: tree is bad))


def in_tables(patch, drafter):
    whole = drafter.held.outbox.table
    patch.setattr(drafter.held.outbox, "table", broken_for_bad(whole, lambda s, entries: s.key[1] == "bad"))


def in_the_forward(patch, drafter):
    bad = next(sequence.tree for sequence in drafter.held if sequence.key[1] == "bad")
    whole = DraftTree.work_on_path

    def work_on_path(self, *arguments, **options):
        work = whole(self, *arguments, **options)
        if self is bad and isinstance(work, Work):
            work.tokens[-1] = 9999
        return work

    patch.setattr(DraftTree, "work_on_path", work_on_path)


@pytest.mark.parametrize("inject", [in_scheduling, in_ranking, in_publishing, in_tables, in_the_forward])
def test_it_ends_one_sequence(monkeypatch: pytest.MonkeyPatch, inject: Inject) -> None:
    drafter, model = make_drafter()
    good, bad = ScriptedTarget(drafter, (1, 2, 3, 4), name="good"), ScriptedTarget(drafter, (5, 6, 7), name="bad")
    inject(monkeypatch, drafter)
    responses = []
    for _ in range(12):
        drafter.step()
        drafter.answer(0.0)
        for of_connection in drafter.held.outbox.take().values():
            responses += of_connection
    refused = [r.sequence_refused for r in responses if r.HasField("sequence_refused")]
    assert [(r.sequence_id, r.reason) for r in refused] == [("bad", speculator_pb2.REFUSAL_REASON_INTERNAL)]
    assert [sequence.key[1] for sequence in drafter.held] == ["good"]
    tables = [table for r in responses if r.HasField("tables") for table in r.tables.tables]
    assert any(table.sequence_id == "good" and table.entries for table in tables)
    monkeypatch.undo()
    good.send(close_sequence=speculator_pb2.CloseSequence(sequence_id="good"))
    assert len(drafter.held) == 0
    assert model.pool.num_used == 0, "nothing of the one that failed is left"
    assert bad.name not in {sequence.key[1] for sequence in drafter.held}


@pytest.mark.parametrize("end", ["close", "disconnect"])
def test_a_sequence_that_does_not_end_well_is_freed(monkeypatch: pytest.MonkeyPatch, end: str) -> None:
    drafter, model = make_drafter()
    bad = ScriptedTarget(drafter, (5, 6, 7), name="bad")
    drafter.step()
    in_publishing(monkeypatch, drafter)
    if end == "close":
        bad.send(close_sequence=speculator_pb2.CloseSequence(sequence_id="bad"))
    else:
        drafter.held.disconnect(bad.connection)
    assert len(drafter.held) == 0
    assert model.pool.num_used == 0


def test_a_refusal_without_a_cause_is_the_engines(monkeypatch: pytest.MonkeyPatch) -> None:
    drafter, model = make_drafter()
    ScriptedTarget(drafter, (1, 2, 3, 4))

    def refuse(segments):
        raise InvalidArgument("nobody's fault")

    monkeypatch.setattr(model, "forward", refuse)
    with pytest.raises(InvalidArgument):
        drafter.step()
