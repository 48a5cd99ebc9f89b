"""A session store of its own for a test, on the server that `specpool up` embeds; it may be killed and come back."""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import sys
import tempfile
from pathlib import Path
from types import TracebackType
from typing import Final

from specpool.errors import SessionStoreUnavailable
from specpool_router.sessions.redis_store import RedisSessionStore
from specpool_tools.local.embedded_store import find_binary, server_command

_START_S: Final = 10.0
_STOP_S: Final = 3.0


class EmbeddedValkey:
    """A running server of a test, for which it is an asynchronous context manager. Start it from the process's main
    thread: the server dies with the thread that started it."""

    def __init__(self, *, binary: Path | None = None) -> None:
        self._binary = binary
        self._directory: Path | None = None
        self._process: asyncio.subprocess.Process | None = None

    async def __aenter__(self) -> EmbeddedValkey:
        await self.start()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.stop()

    @property
    def url(self) -> str:
        """For `RouterConfig.session_store`."""
        return f"unix://{self._socket}"

    @property
    def pid(self) -> int | None:
        """Of the server, while it runs."""
        return self._process.pid if self._process and self._process.returncode is None else None

    @property
    def _socket(self) -> Path:
        assert self._directory is not None, "start it first"
        return self._directory / "valkey.sock"

    async def start(self) -> str:
        """Start it (again, after `stop` or a crash, under the same URL) and wait until it answers. Returns the URL."""
        binary = self._binary or find_binary()
        if self._directory is None:
            self._directory = Path(tempfile.mkdtemp(prefix="specpool-valkey-"))
        self._socket.unlink(missing_ok=True)
        self._process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "specpool_tools.local.shim", str(os.getpid())),
            *server_command(binary, self._socket, directory=self._directory),
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.DEVNULL,
            process_group=0,  # Ctrl-C is for us: the router still writes to it while it drains
        )
        try:
            await self._wait_until_ready()
        except BaseException:
            await self.stop()
            raise
        return self.url

    async def stop(self) -> None:
        """Stop it and remove its directory."""
        if self.pid is not None and self._process is not None:
            self._process.terminate()
            try:
                await asyncio.wait_for(self._process.wait(), _STOP_S)
            except TimeoutError:
                self._process.kill()
                await self._process.wait()
        if self._directory is not None:
            shutil.rmtree(self._directory, ignore_errors=True)
            self._directory = None

    async def kill(self) -> None:
        """SIGKILL: for tests of an outage. `start` brings it back, empty, under the same URL."""
        if self._process is not None:
            with contextlib.suppress(ProcessLookupError):
                self._process.kill()
            await self._process.wait()

    async def _wait_until_ready(self) -> None:
        assert self._process is not None
        deadline = asyncio.get_running_loop().time() + _START_S
        store = RedisSessionStore(self.url)
        try:
            while True:
                try:
                    return await store.probe("test")
                except SessionStoreUnavailable as error:
                    exited = self._process.returncode is not None
                    if exited or asyncio.get_running_loop().time() > deadline:
                        why = f"exit status {self._process.returncode}" if exited else f"no answer in {_START_S:g} s"
                        raise SessionStoreUnavailable(f"the embedded session store did not start: {why}") from error
                    await asyncio.sleep(0.02)
        finally:
            await store.close()
