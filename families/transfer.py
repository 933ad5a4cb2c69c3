"""Copies from CPU memory to the device's."""

import torch
from torch import Tensor


def onto(device: torch.device, tensor: Tensor) -> Tensor:
    """The tensor on the device. The CPU does not wait for the GPU, for which CUDA needs the memory
    that it copies from to be pinned."""
    if device.type != "cuda":
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)
