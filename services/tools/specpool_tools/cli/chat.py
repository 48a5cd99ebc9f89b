"""`specpool chat`: lines in, answers out, and commands that begin with a slash. Never imports torch."""

from __future__ import annotations

import asyncio
import contextlib
import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from rich.console import Console

from specpool.client import Completion, valid_text
from specpool.errors import SpecPoolError
from specpool_tools.cli.errors import report
from specpool_tools.cli.generate import GenerateOptions, build_request, chat_messages, describe_stats, stream_into

HELP: Final = """\
/help         this list
/clear        forget the conversation, keep the system message
/system TEXT  another system message; without TEXT: none
/save FILE    write the conversation to a JSON file
/exit         end (Ctrl-D, too)
//...         a message that begins with a slash
Ctrl-C ends an answer; what had come of it stays in the conversation"""


@dataclass(kw_only=True, slots=True)
class Conversation:
    """What was said so far, and under which system message."""

    system: str = ""
    messages: list[tuple[str, str]] = field(default_factory=list)
    """Pairs of role, `user` or `assistant`, and content."""

    def all_messages(self) -> list[tuple[str, str]]:
        """The messages of a request."""
        return [("system", self.system), *self.messages] if self.system else list(self.messages)

    def save(self, path: Path) -> None:
        """Write the messages as JSON, in the form that chat APIs take. Raises OSError."""
        messages = [{"role": role, "content": content} for role, content in self.all_messages()]
        path.write_text(json.dumps({"messages": messages}, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")


def run_chat(options: GenerateOptions, *, system: str) -> None:
    """Read lines and answer them until end of input or /exit."""
    console = Console(stderr=True, highlight=False)
    console.print(f"[dim]chat with {options.endpoint}; /help lists commands, /exit or Ctrl-D ends it[/dim]")
    conversation = Conversation(system=system)
    while (line := _ask(console)) is not None:
        if line.startswith("/") and not line.startswith("//"):
            answer = command(conversation, line)
            if answer is None:
                return
            console.print(answer, markup=False)
        elif line:
            _answer(conversation, line.removeprefix("/") if line.startswith("//") else line, options, console)


def command(conversation: Conversation, line: str) -> str | None:
    """Do what a line with a slash asks for; the words to print, or None if the chat is to end."""
    name, _, argument = line.partition(" ")
    argument = argument.strip()
    if name in ("/exit", "/quit", "/bye"):
        return None
    commands: dict[str, Callable[[], str]] = {
        "/help": lambda: HELP,
        "/clear": lambda: _clear(conversation),
        "/system": lambda: _set_system(conversation, argument),
        "/save": lambda: _save(conversation, argument),
    }
    return commands.get(name, lambda: f"unknown command {name}; /help lists them, // begins a message with a slash")()


def _clear(conversation: Conversation) -> str:
    conversation.messages.clear()
    return "the conversation is forgotten"


def _set_system(conversation: Conversation, text: str) -> str:
    conversation.system = text
    return "the system message is set" if text else "there is no system message"


def _save(conversation: Conversation, name: str) -> str:
    if not name:
        return "/save needs a file"
    try:
        conversation.save(Path(name).expanduser())
    except OSError as error:
        return f"cannot write {name}: {error.strerror}"
    return f"saved to {name}"


def _ask(console: Console) -> str | None:
    """The next line; None at the end of the input."""
    while True:
        try:
            return input("> ").strip()
        except EOFError:
            return None
        except KeyboardInterrupt:
            console.print("\n[dim]Ctrl-D or /exit ends the chat[/dim]")


def _answer(conversation: Conversation, line: str, options: GenerateOptions, console: Console) -> None:
    """Stream an answer. Ctrl-C ends it alone; an error ends neither the chat nor what was said before."""
    completion = Completion()
    words = ""
    try:
        with valid_text():
            request = build_request(options)
            request.chat.CopyFrom(chat_messages(*conversation.all_messages(), ("user", line)))
        with without_echo():
            asyncio.run(stream_into(completion, request, options, echo=True))
        words = describe_stats(completion, mode=options.mode)
    except KeyboardInterrupt:
        words = "interrupted"
    except SpecPoolError as error:
        print()
        report(error)
    if completion.text:
        conversation.messages += [("user", line), ("assistant", completion.text)]
    if words:
        print()
        console.print(f"[dim]{words}[/dim]")


@contextlib.contextmanager
def without_echo() -> Iterator[None]:
    """A context in which a terminal shows nothing of what is typed; it is read with the next line."""
    if not sys.stdin.isatty():
        yield
        return
    import termios

    terminal = sys.stdin.fileno()
    before = termios.tcgetattr(terminal)
    silent = termios.tcgetattr(terminal)
    silent[3] &= ~termios.ECHO
    termios.tcsetattr(terminal, termios.TCSADRAIN, silent)
    try:
        yield
    finally:
        termios.tcsetattr(terminal, termios.TCSADRAIN, before)
