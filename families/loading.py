"""From a base's name to its family, ready to work on a device."""

import torch

from families.bases import Base
from families.family import Family
from families.qwen_image import QwenImage
from families.z_image import ZImage

FAMILIES: dict[str, type[Family]] = {"z_image": ZImage, "qwen_image": QwenImage}


def default_device() -> torch.device:
    """The first GPU, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def default_dtype(device: torch.device) -> torch.dtype:
    """bfloat16 on a GPU and float32 on a CPU, where it is the faster of the two."""
    return torch.bfloat16 if device.type == "cuda" else torch.float32


def load_family(
    base: Base, device: torch.device | None = None, dtype: torch.dtype | None = None
) -> Family:
    """The base's family. Reads configs now and weights when they are first used.

    Raises `MissingModel` where a part of the base is neither here nor to be had.
    """
    device = device or default_device()
    return FAMILIES[base.family](base, device, dtype or default_dtype(device))
