"""Free and total memory of a device."""

from collections.abc import Iterator
from pathlib import Path

import psutil
import torch

# Share of a GPU's free memory that tensors cannot use: workspaces of kernels and libraries, and
# fragmentation.
RESERVE = 0.06

_CGROUP = Path("/sys/fs/cgroup")
_OF_PROCESS = Path("/proc/self/cgroup")


def free_memory(device: torch.device) -> int:
    """Free bytes of the GPU, or of CPU memory within the container's limit."""
    return free_and_total(device)[0]


def free_and_total(device: torch.device) -> tuple[int, int]:
    """Free and total bytes of a GPU, or of the CPU memory of this process.

    CPU memory is the machine's, or a container's limit minus its use if that is smaller.
    """
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)
    if device.type == "mps":  # the GPU's share of the memory that it has in common with the CPU
        most, used = torch.mps.recommended_max_memory(), torch.mps.driver_allocated_memory()
        return min(most - used, psutil.virtual_memory().available), most
    machine = psutil.virtual_memory()
    free, total = machine.available, machine.total
    for limit, used in _containers():
        if limit < total:
            total = limit
        free = min(free, max(0, limit - used))
    return free, total


def _containers() -> Iterator[tuple[int, int]]:
    """Limit and use in bytes of each of this process's control groups that has a limit."""
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
            yield most, taken - int(kept.get(cache, 0))  # the page cache can be freed


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
