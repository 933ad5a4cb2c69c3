"""Where the recipe computes: on the GPU where there is one. Random numbers come from the CPU
everywhere, so that the same seed means the same noise on every machine."""

import torch

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def bfloat16_products() -> torch.autocast:
    """Matrix products in bfloat16, everything else in float32."""
    return torch.autocast(DEVICE.type, torch.bfloat16)
