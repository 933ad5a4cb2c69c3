"""From the processor's memory to the device's."""

import torch
from torch import Tensor


def onto(device: torch.device, tensor: Tensor) -> Tensor:
    """The tensor on the device. The processor goes on while a GPU still works at what came before,
    for which CUDA wants the memory that it copies from to be pinned."""
    if device.type != "cuda":
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)
