"""Measures the likeness of an image to a subject, by template matching.

The subject is rendered in several sizes and rotations and compared at every position of the image;
the score is the highest normalized correlation of colors inside its silhouette. Nothing is trained,
so a new subject in `drawing.SUBJECT_LAYERS` can be scored at once.

C channels, H rows, W columns, T templates.
"""

from collections.abc import Sequence
from functools import cache

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from miniature.drawing import cutout
from miniature.images import to_tensor

TILTS = (-10.0, 0.0, 10.0)
SCALES = (0.9, 1.0, 1.12)  # of the sizes medium and large
MARGIN = 10  # pixels by which the subject may extend beyond the image


@cache
def _templates(subject: str, colour: str) -> tuple[Tensor, Tensor]:
    """Images [T, 3, H, W] in [-1, 1] with zeros outside, and silhouettes [T, 1, H, W]."""
    side = 44
    shown, masks = [], []
    for size in ("medium", "large"):
        for scale in SCALES:
            for tilt in TILTS:
                image = cutout(subject, size, tilt, colour, side, scale)
                mask = torch.from_numpy(np.asarray(image.getchannel("A")) > 200)[None].float()
                masks.append(mask)
                shown.append(to_tensor([image])[0] * mask)
    return torch.stack(shown), torch.stack(masks)


@torch.no_grad()
def likeness(images: Sequence[Image.Image], subject: str, colour: str = "") -> list[float]:
    """Scores in [0, 1], 1 for the subject itself; with `colour`, for the subject in that color."""
    template_TCHW, mask_T1HW = _templates(subject, colour)
    mask_TCHW = mask_T1HW.expand_as(template_TCHW).contiguous()
    count_T = mask_TCHW.sum(dim=(1, 2, 3))
    mean_T = template_TCHW.sum(dim=(1, 2, 3)) / count_T
    centred_TCHW = (template_TCHW - mean_T[:, None, None, None]) * mask_TCHW
    norm_T = centred_TCHW.square().sum(dim=(1, 2, 3)).sqrt()
    scores = []
    for image in images:
        small = image.resize((64, 64), Image.Resampling.BOX)
        padded = F.pad(to_tensor([small]), (MARGIN,) * 4, mode="replicate")
        product = F.conv2d(padded, centred_TCHW)[0]
        total = F.conv2d(padded, mask_TCHW)[0]
        square = F.conv2d(padded.square(), mask_TCHW)[0]
        spread = (square - total.square() / count_T[:, None, None]).clamp(min=1e-6).sqrt()
        scores.append(float((product / (spread * norm_T[:, None, None])).max().clamp(0, 1)))
    return scores
