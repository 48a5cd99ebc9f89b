"""Settings that suit the machine at hand, for `demo` and `bench`; `up` itself guesses nothing."""

from __future__ import annotations

import os
from pathlib import Path

from specpool_tools.local.awake import can_keep_awake


def recommended_arguments() -> tuple[str, ...]:
    """Arguments of `specpool up` for a target and a draft on this machine.

    On a CPU, each gets cores of its own (two engines on the same cores stall each other), weights in the fastest format
    that this CPU supports, our own attention where it can be compiled, and as many branch rows as may be worth their
    price. The draft computes in float32 between its quantised products, which take and give float32. The cores of a
    virtual machine are kept awake, see `should_keep_awake`.
    """
    import torch

    from specpool.native import has_compiler
    from specpool_engine.modeling.cpu.linear import can_stream, can_use_int4

    if torch.cuda.is_available():
        return ("--dtype", "bfloat16")
    has_bfloat16 = bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    weights = "streamed" if can_stream(torch.bfloat16) and has_compiler() else "prepacked"
    arguments = ["--dtype", "bfloat16" if has_bfloat16 else "float32", "--weights", weights]
    draft_weights = "int4" if can_use_int4() and has_compiler() else "int8"
    arguments += ["--draft-weights", draft_weights, "--draft-dtype", "float32"]
    arguments += ["--row-budget", "8", "--fan-out", "16"]
    if has_compiler():
        arguments += ["--attention-backend", "native", "--draft-attention-backend", "native"]
    cores = sorted(os.sched_getaffinity(0))
    if len(cores) >= 2:
        split = len(cores) // 2
        target, speculator = (",".join(map(str, part)) for part in (cores[:split], cores[split:]))
        arguments += ["--affinity", f"target={target};speculator={speculator}"]
    if should_keep_awake():
        arguments += ["--keep-awake", "true"]
    return tuple(arguments)


def should_keep_awake() -> bool:
    """Whether cores should be kept awake: in virtual machines, but not under a CPU quota, which that would use up."""
    return is_virtual() and not has_cpu_quota() and can_keep_awake()


def has_cpu_quota(control_groups: Path = Path("/sys/fs/cgroup")) -> bool:
    """Whether this container's share of the CPUs is limited."""
    for name in ("cpu.max", "cpu/cpu.cfs_quota_us"):  # of version 2 and 1
        try:
            return (control_groups / name).read_text().split()[0] not in ("max", "-1")
        except (OSError, IndexError):
            continue
    return False


def is_virtual() -> bool:
    """Whether this is a virtual machine, where the CPU tells."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return False
    return any(line.startswith("flags") and "hypervisor" in line.split() for line in lines)
