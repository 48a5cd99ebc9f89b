"""`python -m specpool_engine.modeling.tensor_parallel.follower SOCKET`: the process of a rank above 0.

It computes what rank 0 sends and ends when rank 0 does, or closes the connection.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import sys
import threading
import time
import traceback
from multiprocessing.connection import Connection
from typing import Any, Final

from specpool.errors import SpecPoolError
from specpool_engine.modeling.tensor_parallel.messages import Failure, Imported, Ready, ShardSetup, decode_step

_GRACE_S: Final = 2.0
"""Seconds that a step which runs when rank 0 ends may go on: it waits for rank 0, perhaps for ever."""


def main() -> None:
    """Run a follower. Ctrl-C reaches the whole process group; what it means is rank 0's decision."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    file_descriptor = int(sys.argv[1])
    connection: Connection[Any, Any] = Connection(file_descriptor)
    threading.Thread(target=_end_with_leader, args=(file_descriptor,), daemon=True).start()
    try:
        follow(connection)
    except EOFError:
        os._exit(0)  # not through the clean-up of the process group, which might wait for the other ranks
    except Exception as error:
        traceback.print_exc()
        reason = error.reason if isinstance(error, SpecPoolError) else ""
        with contextlib.suppress(OSError):
            connection.send(Failure(reason, f"{type(error).__name__}: {error}"))
        os._exit(1)


def follow(connection: Connection[Any, Any]) -> None:
    """Load this rank's part, then compute one step after the other, until `EOFError`."""
    setup: ShardSetup = connection.recv()
    from specpool_engine.modeling.tensor_parallel.shard import Shard, open_store

    connection.send(Imported())
    shard = Shard(setup, open_store(setup.size, setup.store_port))
    connection.send(shard.num_blocks)
    model = shard.allocate(connection.recv())
    connection.send(Ready())
    while True:
        segments, copies = decode_step(connection.recv_bytes(), model.pool)
        model.execute(segments, copies)


def _end_with_leader(file_descriptor: int) -> None:
    """End this process when the other end of the connection is closed."""
    poller = select.poll()
    poller.register(file_descriptor, 0)  # a hang-up is reported whatever is asked for
    poller.poll()
    time.sleep(_GRACE_S)
    os._exit(1)


if __name__ == "__main__":
    main()
