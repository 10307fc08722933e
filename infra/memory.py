"""How much memory a device has left for this process."""

from __future__ import annotations

from pathlib import Path

import psutil
import torch

_CGROUPS = Path("/sys/fs/cgroup")
# Limit, what counts against it, and where the part of that lies which the kernel gives back.
_FILES = (
    ("memory.max", "memory.current", "inactive_file"),  # version 2
    ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes", "total_inactive_file"),
)


def free_bytes(device: torch.device) -> int:
    """Memory that may still be taken, in bytes.

    On CUDA what the driver and torch's own cache have; on a processor what the machine has, or the
    container that the process runs in, if that is less.
    """
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return int(free) + cached
    machine: int = psutil.virtual_memory().available
    container = container_free_bytes(_CGROUPS)
    return machine if container is None else min(machine, container)


def container_free_bytes(cgroups: Path) -> int | None:
    """What a container's limit leaves, in bytes; None without a limit.

    cgroups: the control groups as a container sees them, itself at the root. The kernel drops file
    pages before it kills, so those it would drop first count as free.
    """
    for limit_name, used_name, reclaimable in _FILES:
        limit_file, used_file = cgroups / limit_name, cgroups / used_name
        try:
            limit = limit_file.read_text(encoding="ascii").strip()
            used = int(used_file.read_text(encoding="ascii"))
            stat = (used_file.parent / "memory.stat").read_text(encoding="ascii")
        except OSError:
            continue
        if limit == "max":
            return None
        numbers = dict(line.split() for line in stat.splitlines())
        return max(int(limit) - used + int(numbers.get(reclaimable, 0)), 0)
    return None
