"""Requests of the bench, and what is kept of each answer."""

from __future__ import annotations

from dataclasses import asdict, dataclass

from specpool.client import Client, Completion
from specpool.v1 import inference_pb2, types_pb2
from specpool_tools.models.prompts import Prompt

MODE_VALUES = {
    "ssd": types_pb2.SPECULATION_MODE_SSD,
    "sd": types_pb2.SPECULATION_MODE_SD,
    "off": types_pb2.SPECULATION_MODE_OFF,
}
VERIFICATION_VALUES = {
    "coupled": types_pb2.VERIFICATION_MODE_COUPLED,
    "rejection": types_pb2.VERIFICATION_MODE_REJECTION,
}


@dataclass(frozen=True, kw_only=True)
class Setting:
    """One way of generating, to be compared with others on the same prompts."""

    mode: str
    temperature: float
    lookahead: int
    """Lookahead K; 0: the target chooses it."""
    verification: str = "coupled"
    layout: str = "own cores"
    """Name of the layout: which cores target and speculator had."""


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """One prompt under one setting."""

    setting: Setting
    prompt_id: str
    source: str
    token_ids: tuple[int, ...]
    stats: types_pb2.GenerationStats

    @property
    def decode_tokens(self) -> int:
        """Tokens after the first, which the prefill gives."""
        return len(self.token_ids) - 1

    @property
    def decode_seconds(self) -> float:
        """Seconds from the first token to the last, by the target's clock."""
        return self.stats.seconds - self.stats.seconds_to_first_token

    def to_dict(self) -> dict[str, object]:
        """What speeds are made of, as JSON can hold it. Seconds of the forwards are those after the prefill."""
        return {
            **asdict(self.setting),
            "prompt_id": self.prompt_id,
            "source": self.source,
            "decode_tokens": self.decode_tokens,
            "decode_seconds": self.decode_seconds,
            "rounds": self.stats.num_rounds,
            "seconds_waiting": self.stats.seconds_waiting,
            "seconds_forward": self.stats.seconds_forward,
        }


def chat_request(
    prompt: Prompt, setting: Setting, *, max_tokens: int, seed: int, ignore_eos: bool = False
) -> inference_pb2.GenerateRequest:
    """The request that sends `prompt` as a user's message."""
    sampling = types_pb2.SamplingParams(
        temperature=setting.temperature, max_tokens=max_tokens, seed=seed, ignore_eos=ignore_eos
    )
    return inference_pb2.GenerateRequest(
        chat=inference_pb2.ChatPrompt(messages=[inference_pb2.ChatMessage(role="user", content=prompt.text)]),
        sampling=sampling,
        mode=MODE_VALUES[setting.mode],
        verification=VERIFICATION_VALUES[setting.verification],
        max_lookahead=setting.lookahead or None,
    )


async def measure(
    client: Client, prompt: Prompt, setting: Setting, *, max_tokens: int, seed: int, ignore_eos: bool = False
) -> Measurement:
    """Generate once and keep what the report needs."""
    request = chat_request(prompt, setting, max_tokens=max_tokens, seed=seed, ignore_eos=ignore_eos)
    completion: Completion = await client.complete(request)
    return Measurement(
        setting=setting,
        prompt_id=prompt.id,
        source=prompt.source,
        token_ids=tuple(completion.token_ids),
        stats=completion.stats,
    )
