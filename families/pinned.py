"""Pinned (page-locked) CPU memory, which a GPU reads without the CPU waiting.

PyTorch's allocator of pinned memory rounds every size up to a power of two, and keeps freed memory:
the offloaded 16-bit weights of Qwen-Image would take 64 GB instead of 41. Here each tensor has its
own pages, which are returned to the system with the tensor.
"""

import logging
import mmap
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor

log = logging.getLogger(__name__)

_warned = False


class _Pages(mmap.mmap):
    """Anonymous pages. Unpins them before they are returned to the system."""

    address = 0  # if they are pinned

    def __del__(self) -> None:
        if self.address:
            _driver().cudaHostUnregister(self.address)


@torch.no_grad()
def pinned(tensor: Tensor) -> Tensor:
    """A contiguous copy in pinned CPU memory of its own, rounded up to a page (4 kB).

    If the system refuses to pin memory, the copy is not pinned, with one warning.
    """
    if not tensor.numel():
        return tensor.to("cpu", copy=True)
    size = tensor.numel() * tensor.itemsize
    pages = _Pages(-1, size)
    values = torch.frombuffer(pages, dtype=torch.uint8)[:size]
    code = int(_driver().cudaHostRegister(values.data_ptr(), size, 0))
    if code == 0:
        pages.address = values.data_ptr()
    else:
        _clear_error()
        _warn(code)
    return values.view(tensor.dtype).view(tensor.shape).copy_(tensor.detach())


def _driver() -> Any:
    return torch.cuda.cudart()


def _clear_error() -> None:
    """CUDA keeps the last error until a kernel's launch reports it."""
    with suppress(RuntimeError):
        torch.zeros(1, device="cuda")


def _warn(code: int) -> None:
    global _warned
    if not _warned:
        _warned = True
        log.warning(
            "CPU memory cannot be pinned (CUDA error %d; see `ulimit -l`): copies of weights to "
            "the GPU are slower",
            code,
        )
