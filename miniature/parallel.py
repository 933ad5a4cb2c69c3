"""Data parallelism for few cores: processes of one thread each, gradients averaged.

At miniature size most operations are too small to be worth a thread's hand-over, and on a shared
machine two threads that wait for each other at every operation lose far more than two processes
that meet once a step. Every rank draws the whole step's randomness and takes its own rows, so
the number of processes does not change what is learned (up to rounding).
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
    """This process's number, 0 when alone."""
    return dist.get_rank() if dist.is_initialized() else 0


def world() -> int:
    """How many processes train together."""
    return dist.get_world_size() if dist.is_initialized() else 1


def rows(count: int) -> slice:
    """This rank's share of `count` rows."""
    if count % world():
        raise ValueError(f"a batch of {count} does not divide among {world()} processes")
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
    """Every rank's share of `rows`, put together again on every rank."""
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
    """Runs `work` (picklable) in so many processes; returns when all have ended."""
    if processes == 1:
        work()
        return
    with tempfile.TemporaryDirectory() as folder:
        store = str(Path(folder) / "store")
        mp.spawn(_entry, args=(processes, store, work), nprocs=processes, join=True)
