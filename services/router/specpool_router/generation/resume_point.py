"""Where a resumed stream goes on: what the journal says and what the client says that it has, brought together."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Iterator, Sequence
from dataclasses import dataclass

from specpool.errors import InvalidArgument, ResumeImpossible
from specpool.request_limits import invalid_value
from specpool.v1 import inference_pb2, types_pb2
from specpool_router.generation.progress import Delta, Progress
from specpool_router.generation.target_run import Event


@dataclass(frozen=True, kw_only=True, slots=True)
class ResumePoint:
    """A request to go on, and what its client has."""

    request_id: str
    num_tokens: int = 0
    num_chars: int | None = None
    """Number of characters of text that the client has; None: the text that came with its tokens."""
    token_ids: Sequence[int] | None = None
    """Tokens that the client has; None: it only counted them."""
    request: inference_pb2.GenerateRequest | None = None
    """The original request, for when the session is lost."""

    def __post_init__(self) -> None:
        if self.token_ids is not None and len(self.token_ids) != self.num_tokens:
            raise _wrong_count(self.num_tokens, f"{len(self.token_ids)}, the number of received_token_ids, or 0")


class Journal:
    """The deltas that a session's streams sent so far."""

    def __init__(self, entries: Sequence[bytes]) -> None:
        self.entries = list(entries)
        self.deltas = [Delta.FromString(entry) for entry in entries]
        self.token_ids = [token for delta in self.deltas for token in delta.token_ids]

    @property
    def num_chars(self) -> int:
        """Number of characters of the journal's text."""
        return sum(len(delta.text) for delta in self.deltas)

    def agrees_with(self, point: ResumePoint) -> bool:
        """Whether what the client has begins the journal, as far as can be said."""
        if point.num_tokens > len(self.token_ids):
            return False
        return point.token_ids is None or self.token_ids[: point.num_tokens] == list(point.token_ids)

    def check_ended(self, point: ResumePoint) -> None:
        """Raise if the client has the beginning of another answer than this one, which is complete."""
        if point.num_tokens > len(self.token_ids):
            raise _wrong_count(point.num_tokens, f"at most {len(self.token_ids)}, the tokens of the whole answer")
        if not self.agrees_with(point):
            raise ResumeImpossible(
                "the request ended with an answer that does not begin with the tokens received",
                metadata={"num_tokens_received": point.num_tokens},
            )

    def cut_to(self, token_ids: Sequence[int]) -> None:
        """Keep the deltas that lie within ``token_ids``, the client's, which count; what follows is another answer."""
        num_kept = position = 0
        for delta in self.deltas:
            end = position + len(delta.token_ids)
            if end > len(token_ids) or list(delta.token_ids) != list(token_ids[position:end]):
                break
            num_kept, position = num_kept + 1, end
        self.entries, self.deltas = self.entries[:num_kept], self.deltas[:num_kept]
        self.token_ids = self.token_ids[:position]


def check_can_regenerate(request: inference_pb2.GenerateRequest, journal: Journal, point: ResumePoint) -> None:
    """Raise if the tokens that only the client has would not come out the same a second time."""
    is_sampled = request.sampling.temperature > 0
    if is_sampled and request.verification == types_pb2.VERIFICATION_MODE_REJECTION:
        raise ResumeImpossible(
            f"the client has {point.num_tokens} tokens, the journal {len(journal.token_ids)}, and under rejection "
            "verification the tokens between would be others: resume with received_token_ids",
            metadata={
                "field": "received_token_ids",
                "num_tokens_received": point.num_tokens,
                "num_tokens_journaled": len(journal.token_ids),
            },
        )


class Gap:
    """Tokens that the client has and the journal lacks: their text comes from the target that goes on from them."""

    def __init__(self, journal: Journal, token_ids: Sequence[int]) -> None:
        self._token_ids = list(token_ids[len(journal.token_ids) :])
        self._num_chars_before = journal.num_chars
        self._num_chars = 0
        self.progress = Progress(
            token_ids=[*journal.token_ids, *self._token_ids],
            num_chars=journal.num_chars,
            is_prompt_counted=len(token_ids) > 0,
        )

    def fill(self, event: Event) -> Iterator[Event]:
        """Pass an event on, after a delta of the missing tokens and their text if it is the first that brings any."""
        if event.HasField("started"):
            num_final = event.started.num_committed_text_chars
            self._num_chars = max(0, num_final - self._num_chars_before)
        elif self._token_ids:
            yield Event(delta=Delta(token_ids=self._token_ids, text=event.delta.text[: self._num_chars]))
            self._token_ids = []
            if event.HasField("delta"):
                event.delta.text = event.delta.text[self._num_chars :]
                if not (event.delta.text or event.delta.token_ids):
                    return
        yield event


async def regenerated(events: AsyncGenerator[Event, None], progress: Progress, num_tokens: int) -> list[int]:
    """The first ``num_tokens`` of a stream, fewer if it is cancelled; raises if there are not as many."""
    async for event in events:
        if len(progress.token_ids) >= num_tokens:
            break
        if event.HasField("finished") and event.finished.finish_reason != types_pb2.FINISH_REASON_CANCELLED:
            accepted = f"at most {len(progress.token_ids)}, the tokens of the whole answer"
            raise _wrong_count(num_tokens, accepted)
    return progress.token_ids[:num_tokens]


def _wrong_count(num_tokens: int, accepted: str) -> InvalidArgument:
    return invalid_value("num_tokens_received", num_tokens, accepted)
