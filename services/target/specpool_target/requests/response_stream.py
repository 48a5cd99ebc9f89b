"""The stream of one request: updates of the engine become protocol messages."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from opentelemetry.trace import Span

from specpool.telemetry import tracing
from specpool.v1 import inference_pb2, target_pb2, types_pb2
from specpool_engine.modeling.detokenizer import IncrementalDetokenizer
from specpool_engine.modeling.text_codec import TextCodec
from specpool_target.engine.sequence import Finish, FinishReason, Pairing, SequenceRequest, SequenceUpdate
from specpool_target.verify.verify_step import TokenLogprobs

Response = target_pb2.RunSequenceResponse


class ResponseStream:
    """Turns updates into responses, and rounds into span events."""

    def __init__(
        self,
        request: SequenceRequest,
        codec: TextCodec,
        span: Span,
        *,
        num_text_chars_sent: int,
        model_name: str,
        max_length: int,
    ) -> None:
        self.request = request
        self._span = span
        self._rounds = tracing.RoundEvents(span)
        self._model_name = model_name
        self._max_length = max_length
        self._num_tokens = len(request.committed_tokens)
        self._detokenizer = IncrementalDetokenizer(
            codec.decode, prompt_tokens=request.prompt_tokens, stop=request.sampling.stop
        )
        self._committed_stop: FinishReason | None = None
        self._num_known_chars = num_text_chars_sent
        """Characters that the client has and this stream has not come to yet."""
        committed_text = self._replay(request.committed_tokens)
        self._num_committed_chars = len(committed_text) if request.committed_tokens else None
        self.pending_text = self._unknown(committed_text)
        """Text of committed tokens that the client does not have yet."""

    @property
    def engine_detokenizer(self) -> IncrementalDetokenizer | None:
        """The engine's detokenizer, where stop strings end the output, so that it has to see the text; else None."""
        return self._detokenizer if self.request.sampling.stop else None

    @property
    def is_complete(self) -> FinishReason | None:
        """Why nothing is left to do, if the target that ran this before was lost after the last token; else None."""
        committed = self.request.committed_tokens
        if self._committed_stop is not None:
            return self._committed_stop
        if committed and committed[-1] in self.request.stop_token_ids:
            return FinishReason.STOP
        length = len(self.request.prompt_tokens) + len(committed)
        if len(committed) >= self.request.sampling.max_tokens or (committed and length >= self._max_length):
            return FinishReason.LENGTH
        return None

    def _replay(self, committed: Sequence[int]) -> str:
        delta = self._detokenizer.push(committed)
        if delta.stopped:
            self._committed_stop = FinishReason.STOP
            return delta.text
        if self.is_complete is not None:
            return delta.text + self._detokenizer.finish().text
        return delta.text

    def _unknown(self, text: str) -> str:
        """The part of the next text of the output that the client lacks."""
        new = text[self._num_known_chars :]
        self._num_known_chars -= len(text) - len(new)
        return new

    def started(self, request_id: str) -> Response:
        """The first message: the request has been taken."""
        seed = self.request.sampling.seed
        assert seed is not None, "drawn when the request was read"
        started = inference_pb2.GenerationStarted(
            request_id=request_id,
            model=self._model_name,
            seed=seed,
            num_prompt_tokens=len(self.request.prompt_tokens),
            num_committed_text_chars=self._num_committed_chars,
        )
        return Response(started=started)

    def whole(self, request_id: str, reason: FinishReason) -> Iterator[Response]:
        """All messages of a stream in which nothing is left to do."""
        yield self.started(request_id)
        if self.pending_text:
            yield Response(delta=inference_pb2.GenerationDelta(text=self.pending_text))
        yield self.finished(Finish(reason=reason, stats=types_pb2.GenerationStats(), num_cached_prompt_tokens=0))

    def responses(self, update: SequenceUpdate) -> Iterator[Response]:
        """The messages that say what an update brought; raises the error with which the sequence failed."""
        if update.error is not None:
            raise update.error
        if update.paired is not None:
            self._span.set_attribute(tracing.SPECULATOR, update.paired.address)
            yield _paired(update.paired)
            return
        if update.round is not None:
            self._rounds.add(
                num_draft_tokens=update.round.num_draft_tokens,
                num_accepted=update.round.num_accepted,
                outcome=update.round.lookup,
                duration_s=update.round.phases.total,
                phases_s=update.round.phases.parts(),
            )
        yield self._delta(update)
        if update.finish is not None:
            yield self.finished(update.finish)

    def _delta(self, update: SequenceUpdate) -> Response:
        self._num_tokens += len(update.tokens)
        text = update.text
        if text is None:
            text = self._detokenizer.push(update.tokens).text
            text += self._detokenizer.finish().text if update.finish else ""
        text, self.pending_text = self.pending_text + self._unknown(text), ""
        delta = inference_pb2.GenerationDelta(
            token_ids=update.tokens, text=text, logprobs=[_to_proto(position) for position in update.logprobs]
        )
        return Response(delta=delta)

    def finished(self, finish: Finish) -> Response:
        """The last message: why the output ended, and its statistics."""
        usage = types_pb2.Usage(
            num_prompt_tokens=len(self.request.prompt_tokens),
            num_cached_prompt_tokens=finish.num_cached_prompt_tokens,
            num_completion_tokens=self._num_tokens,
        )
        self._rounds.finish()
        reason = finish.reason.label
        self._span.set_attribute(tracing.GEN_AI_RESPONSE_FINISH_REASONS, [reason])
        self._span.set_attribute(tracing.GEN_AI_USAGE_OUTPUT_TOKENS, usage.num_completion_tokens)
        self._span.set_attribute(tracing.GEN_AI_USAGE_CACHED_INPUT_TOKENS, usage.num_cached_prompt_tokens)
        message = inference_pb2.GenerationFinished(finish_reason=finish.reason.value, usage=usage, stats=finish.stats)
        return Response(finished=message)


def _paired(pairing: Pairing) -> Response:
    return Response(paired=target_pb2.Paired(endpoint=pairing.address, speculator_id=pairing.speculator_id))


def _to_proto(position: TokenLogprobs) -> types_pb2.PositionLogprobs:
    return types_pb2.PositionLogprobs(
        chosen=types_pb2.TokenLogprob(token_id=position.token_id, logprob=position.chosen),
        top=[types_pb2.TokenLogprob(token_id=token, logprob=value) for token, value in position.top],
    )
