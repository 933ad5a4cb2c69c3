"""How much memory a device has and has left."""

from collections.abc import Iterator
from pathlib import Path

import psutil
import torch

# Of a GPU's free memory, beside what tensors hold: workspaces of kernels and libraries, and gaps
# between blocks.
RESERVE = 0.06

_CGROUP = Path("/sys/fs/cgroup")
_OF_PROCESS = Path("/proc/self/cgroup")


def free_memory(device: torch.device) -> int:
    """Bytes that can be taken now: of the GPU, or of the machine and its container."""
    return free_and_total(device)[0]


def free_and_total(device: torch.device) -> tuple[int, int]:
    """Free bytes and all bytes of a GPU, or of this process's host memory.

    Host memory is the machine's; a container's limit, less what the container uses, where that
    is smaller.
    """
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)
    machine = psutil.virtual_memory()
    free, total = machine.available, machine.total
    for limit, used in _containers():
        if limit < total:
            total = limit
        free = min(free, max(0, limit - used))
    return free, total


def _containers() -> Iterator[tuple[int, int]]:
    """Limit and use in bytes of every control group with a limit that this process is in."""
    for folder in _groups():
        for limit, used, cache in (
            ("memory.max", "memory.current", "inactive_file"),
            ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
        ):
            try:
                most = int((folder / limit).read_text())
                taken = int((folder / used).read_text())
                lines = (folder / "memory.stat").read_text().splitlines()
            except (OSError, ValueError):  # no such file, or "max": no limit
                continue
            kept = dict(line.split() for line in lines)
            yield most, taken - int(kept.get(cache, 0))  # which would be given back


def _groups() -> Iterator[Path]:
    """The folders of this process's control groups, up to the root."""
    folders = {_CGROUP, _CGROUP / "memory"}
    try:
        lines = _OF_PROCESS.read_text().splitlines()
    except OSError:
        lines = []
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers in ("", "memory"):
            top = _CGROUP / controllers
            inner = top / path.lstrip("/")
            folders |= {each for each in (inner, *inner.parents) if each.is_relative_to(top)}
    yield from sorted(folders)
