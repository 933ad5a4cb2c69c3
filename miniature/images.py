"""Converts between Pillow images and tensors in [-1, 1].

B batch, C channels, H rows, W columns.
"""

from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image
from torch import Tensor


def to_tensor(images: Sequence[Image.Image]) -> Tensor:
    """float32 [B, 3, H, W] in [-1, 1]."""
    array_BHWC = np.stack([np.asarray(image.convert("RGB")) for image in images])
    return torch.from_numpy(array_BHWC).permute(0, 3, 1, 2).float() / 127.5 - 1


def to_images(pixels_BCHW: Tensor) -> list[Image.Image]:
    """RGB images; values beyond [-1, 1] are clipped."""
    bytes_BCHW = ((pixels_BCHW.detach().float().clamp(-1, 1) + 1) * 127.5).round().byte()
    return [Image.fromarray(x) for x in bytes_BCHW.permute(0, 2, 3, 1).contiguous().cpu().numpy()]
