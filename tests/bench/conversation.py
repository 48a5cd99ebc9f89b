"""A conversation through the chat template: how much of each turn's prompt the prefix caches had.

Each turn sends the whole conversation again, with the model's answers in it, as clients do. What the caches have is
whole blocks of it, as far as the template renders the same tokens again.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from scaling import LETTERS

from specpool.client import Client
from specpool.v1 import inference_pb2
from specpool_tools.bench.requests import Setting, chat_request
from specpool_tools.models.prompts import Prompt

TOY_TURN_TOKENS: Final = 500
REAL_TURN_TOKENS: Final = 100
WORDS: Final = (
    "river",
    "stone",
    "window",
    "garden",
    "letter",
    "bridge",
    "winter",
    "candle",
    "market",
    "sailor",
    "violin",
)


@dataclass(frozen=True, kw_only=True)
class Turn:
    """One prompt of the conversation."""

    num_prompt_tokens: int
    num_cached_target: int
    num_cached_speculator: int
    first_token_s: float


def question(turn: int, *, is_toy: bool) -> str:
    """What the user says: another text in each turn."""
    if is_toy:
        return "".join(LETTERS[(turn * 5 + i * i) % 26] for i in range(TOY_TURN_TOKENS))
    words = " ".join(WORDS[(turn * 5 + i * i) % len(WORDS)] for i in range(REAL_TURN_TOKENS))
    return f"Write a story with these words, in this order: {words}."


async def measure_turns(endpoint: str, num_turns: int, *, is_toy: bool) -> list[Turn]:
    """Hold a conversation of `num_turns` turns."""
    setting = Setting(mode="ssd", temperature=1.0 if is_toy else 0.0, lookahead=6 if is_toy else 4)
    num_tokens = TOY_TURN_TOKENS if is_toy else REAL_TURN_TOKENS
    messages, found = list[inference_pb2.ChatMessage](), list[Turn]()
    async with Client(endpoint) as client:
        for turn in range(num_turns):
            messages.append(inference_pb2.ChatMessage(role="user", content=question(turn, is_toy=is_toy)))
            prompt = Prompt(id="chat", source="bench", text="")
            chat = chat_request(prompt, setting, max_tokens=num_tokens, seed=1, ignore_eos=is_toy)
            chat.chat.CopyFrom(inference_pb2.ChatPrompt(messages=messages))
            if is_toy:
                chat.sampling.logit_bias[0] = -100.0  # the end token has no text, and the next prompt would lack it
            before = await cached_by_speculators(client)
            completion = await client.complete(chat)
            messages.append(inference_pb2.ChatMessage(role="assistant", content=completion.text))
            found.append(
                Turn(
                    num_prompt_tokens=completion.usage.num_prompt_tokens,
                    num_cached_target=completion.usage.num_cached_prompt_tokens,
                    num_cached_speculator=await cached_by_speculators(client) - before,
                    first_token_s=completion.stats.seconds_to_first_token,
                )
            )
    return found


async def cached_by_speculators(client: Client) -> int:
    """Tokens that the prefix caches of speculators have had so far."""
    status = await client.cluster_status()
    return sum(entry.status.load.num_prefix_cache_hit_tokens for entry in status.speculators)


def text_of(turn: Turn) -> str:
    """A line for people to read."""
    cached = turn.num_cached_target, turn.num_cached_speculator
    shares = [f"{one} ({one / turn.num_prompt_tokens:.0%})" for one in cached]
    return (
        f"{turn.num_prompt_tokens} tokens, cached on target {shares[0]}, on speculator {shares[1]}, "
        f"first token after {turn.first_token_s * 1e3:.0f} ms"
    )
