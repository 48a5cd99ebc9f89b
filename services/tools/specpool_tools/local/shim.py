"""`python -m specpool_tools.local.shim PARENT_PID COMMAND...`: become COMMAND, and die with the parent.

The kernel's parent-death signal survives exec, so any program can be started this way.
"""

from __future__ import annotations

import os
import signal
import sys

from specpool.process import die_with_parent


def main() -> None:
    """Become the command, and die with the parent."""
    die_with_parent(parent_pid=int(sys.argv[1]), with_signal=signal.SIGKILL)
    command = sys.argv[2:]
    try:
        os.execvp(command[0], command)
    except OSError as error:
        sys.exit(f"error: cannot start {command[0]}: {error}")


if __name__ == "__main__":
    main()
