"""`specpool chat` without a router: commands, the end of an answer, words on what was drafted; lines of `status`."""

from __future__ import annotations

import builtins
import contextlib
import json
import os
import pty
import termios
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from specpool.client import Completion
from specpool.errors import TargetUnavailable
from specpool_tools.cli import chat
from specpool_tools.cli.chat import Conversation, command, run_chat
from specpool_tools.cli.generate import GenerateOptions, describe_stats
from specpool_tools.cli.status import describe

OPTIONS = GenerateOptions(endpoint="127.0.0.1:1")


def talk(monkeypatch: pytest.MonkeyPatch, lines: list[str], answers: list[str | BaseException]) -> list[Any]:
    """The messages of every request of a chat in which the user types `lines`; an error comes after some text."""
    typed, ready, requests = iter(lines), iter(answers), []

    def read(_: str) -> str:
        line = next(typed, None)
        if line is None:
            raise EOFError
        return line

    async def answer(completion: Completion, request: Any, *_: Any, **__: Any) -> None:
        requests.append([(message.role, message.content) for message in request.chat.messages])
        reply = next(ready)
        completion.text = "part" if isinstance(reply, KeyboardInterrupt) else ""
        if isinstance(reply, BaseException):
            raise reply
        completion.text = reply

    monkeypatch.setattr(builtins, "input", read)
    monkeypatch.setattr(chat, "stream_into", answer)
    run_chat(OPTIONS, system="be brief")
    return requests


SYSTEM = ("system", "be brief")


def test_ctrl_c_ends_the_answer_and_not_the_chat(monkeypatch: pytest.MonkeyPatch) -> None:
    requests = talk(monkeypatch, ["a", "b"], [KeyboardInterrupt(), "two"])
    assert requests[1] == [SYSTEM, ("user", "a"), ("assistant", "part"), ("user", "b")]


def test_an_error_ends_neither_the_chat_nor_the_conversation(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    requests = talk(monkeypatch, ["a", "b"], [TargetUnavailable("gone"), "two"])
    assert requests[1] == [SYSTEM, ("user", "b")]
    assert "error: TARGET_UNAVAILABLE: gone" in capsys.readouterr().err


def test_commands_do_not_go_to_the_model(monkeypatch: pytest.MonkeyPatch) -> None:
    lines = ["/help", "", "a", "/system be long", "/clear", "//b", "/nonsense", "/exit", "c"]
    requests = talk(monkeypatch, lines, ["one", "two"])
    assert requests == [[SYSTEM, ("user", "a")], [("system", "be long"), ("user", "/b")]]


def test_a_conversation_is_saved(tmp_path: Path) -> None:
    conversation = Conversation(system="s", messages=[("user", "é"), ("assistant", "b")])
    file = tmp_path / "chat.json"
    assert command(conversation, f"/save {file}") == f"saved to {file}"
    messages = json.loads(file.read_text(encoding="utf-8"))["messages"]
    assert [(message["role"], message["content"]) for message in messages] == conversation.all_messages()
    assert "cannot write" in str(command(conversation, f"/save {tmp_path}"))


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> Iterator[int]:
    ours, theirs = pty.openpty()
    with os.fdopen(theirs, "r") as stdin:
        monkeypatch.setattr("sys.stdin", stdin)
        yield theirs
    os.close(ours)


def test_typing_is_not_echoed_into_the_answer(terminal: int) -> None:
    def echoes() -> bool:
        return bool(termios.tcgetattr(terminal)[3] & termios.ECHO)

    assert echoes()
    with contextlib.suppress(KeyboardInterrupt), chat.without_echo():
        assert not echoes()
        raise KeyboardInterrupt
    assert echoes()


def completion(num_draft_tokens: int) -> Completion:
    result = Completion(token_ids=[1] * 5)
    result.stats.num_rounds = 4
    result.stats.num_draft_tokens = num_draft_tokens
    result.stats.num_accepted_tokens = num_draft_tokens // 2
    return result


def test_words_on_what_was_drafted() -> None:
    assert "speculation pauses while plain decoding is faster" in describe_stats(completion(0), mode="ssd")
    assert "accepted a round" not in describe_stats(completion(0), mode="ssd")
    assert "1.00 draft tokens accepted a round" in describe_stats(completion(8), mode="ssd")
    assert describe_stats(completion(0), mode="off").endswith("4 rounds")


def test_status_fits_80_columns() -> None:
    model = {"name": "qwen2.5-coder-1.5b-instruct-with-a-long-name", "dtype": "bfloat16", "weights": "streamed"}
    load = {"sequences_running": 100, "sequences_waiting": 1000, "free_kv_blocks": 123456, "kv_blocks": 123456}
    cache = {"prefix_cache_hit_tokens": 1, "prefix_cache_queried_tokens": 2}
    entry = {
        "id": "specpool-target-7c9f8d6b5-x2x4z",
        "endpoint": "[2001:db8:0:0:0:0:0:1]:50051",
        "reachable": True,
        "error": "",
        "state": "serving",
        "incarnation": "0123456789abcdef",
        "model": {**model, "attention_backend": "native", "device": "cpu"},
        "load": {**load, **cache},
        "speculators": [{"id": "specpool-speculator-" + str(index)} for index in range(3)],
    }
    for shown in (entry, {**entry, "reachable": False, "error": "failed to connect to all addresses " * 5}):
        lines = list(describe("target", shown, "speculators"))
        assert max(map(len, lines)) <= 80
        assert entry["id"] in lines[0]
