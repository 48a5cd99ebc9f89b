"""The process of one rank above 0, as rank 0 sees it."""

from __future__ import annotations

import contextlib
import socket
import subprocess
import sys
import time
from multiprocessing.connection import Connection
from typing import Any, Final, TypeVar

from specpool.errors import FollowerLost, SpecPoolError, error_from_reason
from specpool_engine.modeling.tensor_parallel.messages import Failure

_FOLLOWER: Final = "specpool_engine.modeling.tensor_parallel.follower"
STOP_S: Final = 5.0
"""Seconds that a follower which was told to end may take; then it is killed."""
Message = TypeVar("Message")


class FollowerProcess:
    """The process of one rank above 0, and the connection to it."""

    def __init__(self, rank: int) -> None:
        ours, theirs = socket.socketpair()
        with theirs:
            command = [sys.executable, "-m", _FOLLOWER, str(theirs.fileno())]
            self.process = subprocess.Popen(command, pass_fds=[theirs.fileno()], stdin=subprocess.DEVNULL)
        self.rank = rank
        self.connection: Connection[Any, Any] = Connection(ours.detach())

    def receive(self, kind: type[Message], deadline_s: float) -> Message:
        """Wait for the follower's next message.

        Raises:
            SpecPoolError: as the follower reported it; `FollowerLost` if it ended or the deadline passed.
        """
        try:
            if not self.connection.poll(max(0.0, deadline_s - time.monotonic())):
                raise FollowerLost(
                    f"rank {self.rank} did not load its part of the model in time", metadata={"rank": self.rank}
                )
            message = self.connection.recv()
        except (EOFError, OSError):
            raise self.lost() from None
        if isinstance(message, Failure):
            raise self._reported(message)
        assert isinstance(message, kind), f"{message!r} is not the {kind.__name__} that comes next"
        return message

    def lost(self) -> SpecPoolError:
        """The error that says why the connection to the follower ended."""
        with contextlib.suppress(EOFError, OSError):
            if self.connection.poll() and isinstance(message := self.connection.recv(), Failure):
                return self._reported(message)
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(STOP_S)
        status = self.process.returncode
        how = f"was ended by signal {-status}" if status is not None and status < 0 else f"ended with status {status}"
        return FollowerLost(
            f"rank {self.rank} of the tensor parallel model {how}", metadata={"rank": self.rank, "status": status}
        )

    def _reported(self, failure: Failure) -> SpecPoolError:
        message = f"rank {self.rank}: {failure.message}"
        if failure.reason:
            return error_from_reason(failure.reason, message)
        return FollowerLost(message, metadata={"rank": self.rank})

    def wait(self) -> None:
        """Wait for the end of the process, which sees that the connection is closed; kill it if it does not."""
        try:
            self.process.wait(STOP_S)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
