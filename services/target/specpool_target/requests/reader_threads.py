"""Where requests are read: beside the event loop, a few at a time, and short ones never behind long ones."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Final, TypeVar

T = TypeVar("T")

_NUM_THREADS: Final = 2
_LARGE_BYTES: Final = 256 * 1024


class ReaderThreads:
    """Threads for what takes milliseconds to seconds: chat templates, tokenizing, the text of a continued output.

    Tokenizers release the interpreter; a chat template does not, but shares it with the event loop every millisecond.
    Requests wait in order of arrival; how many there are is bounded by the calls that the server accepts.
    """

    def __init__(self) -> None:
        self._small = ThreadPoolExecutor(_NUM_THREADS, thread_name_prefix="request reader")
        self._large = ThreadPoolExecutor(1, thread_name_prefix="large request reader")

    async def run(self, num_bytes: int, work: Callable[[], T]) -> T:
        """The result of `work`, done in a thread chosen by the size of the request it reads."""
        threads = self._large if num_bytes > _LARGE_BYTES else self._small
        return await asyncio.get_running_loop().run_in_executor(threads, work)
