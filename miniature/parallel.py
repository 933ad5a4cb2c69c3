"""Data parallelism on few CPU cores: processes with one thread each and averaged gradients.

At miniature size most operations are too small for multithreading, and on a shared machine two
threads that synchronize at every operation are much slower than two processes that synchronize once
a step. Every rank samples the random numbers of the whole batch and uses its rows, so the result
does not depend on the number of processes (up to rounding).
"""

import os
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor


def rank() -> int:
    """This process's rank, 0 with a single process."""
    return dist.get_rank() if dist.is_initialized() else 0


def world() -> int:
    """The number of processes."""
    return dist.get_world_size() if dist.is_initialized() else 1


def rows(count: int) -> slice:
    """This rank's share of `count` rows."""
    if count % world():
        raise ValueError(f"a batch of {count} is not divisible by {world()} processes")
    share = count // world()
    return slice(rank() * share, (rank() + 1) * share)


def average_gradients(parameters: Iterable[Tensor]) -> None:
    """Replaces every gradient by its mean over the ranks."""
    if world() == 1:
        return
    gradients = [p.grad for p in parameters if p.grad is not None]
    flat = torch.cat([g.flatten() for g in gradients])
    dist.all_reduce(flat)
    flat /= world()
    for gradient, part in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
        gradient.copy_(part.view_as(gradient))


def gather_rows(share: Tensor) -> Tensor:
    """Gathers the shares of all ranks, on every rank."""
    if world() == 1:
        return share
    raw = share.contiguous().view(torch.uint8)
    shares = [torch.empty_like(raw) for _ in range(world())]
    dist.all_gather(shares, raw)
    return torch.cat(shares).view(share.dtype)


def _entry(number: int, processes: int, store: str, work: Callable[[], None]) -> None:
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // processes))
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=number,
                            world_size=processes)  # fmt: skip
    try:
        work()
    finally:
        dist.destroy_process_group()


def launch(work: Callable[[], None], processes: int) -> None:
    """Runs `work` (picklable) in `processes` processes; returns when all have ended."""
    if processes == 1:
        work()
        return
    with tempfile.TemporaryDirectory() as folder:
        store = str(Path(folder) / "store")
        mp.spawn(_entry, args=(processes, store, work), nprocs=processes, join=True)
