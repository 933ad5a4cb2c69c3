"""What differs between kinds of devices: names, memory caches, and number types.

The device of a process is chosen in `families.loading.default_device` and nowhere else. Apple
silicon (`mps`) has no float64, no pinned memory and no measurement of the peak of its memory, which
it shares with the CPU.
"""

import torch


def device_name(device: torch.device) -> str:
    """The GPU's name, or the device's type."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return "Apple GPU" if device.type == "mps" else device.type


def peak_bytes(device: torch.device) -> int | None:
    """The most memory that tensors had on the device so far; None where it is not measured."""
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None


def empty_cache(device: torch.device) -> None:
    """Returns memory that PyTorch keeps for later tensors to the device."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
    elif device.type == "mps":
        torch.mps.empty_cache()


def widest(device: torch.device) -> torch.dtype:
    """The type for sums of many values: float64 where the device has it."""
    return torch.float32 if device.type == "mps" else torch.float64
