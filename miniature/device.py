"""The device of the recipe: the GPU if there is one. Random numbers are always sampled on the CPU,
so that a seed gives the same noise on every machine."""

import torch

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def bfloat16_products() -> torch.autocast:
    """Matrix products in bfloat16, everything else in float32."""
    return torch.autocast(DEVICE.type, torch.bfloat16)
