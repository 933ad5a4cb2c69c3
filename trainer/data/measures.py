"""Measures an image's pixels for the checks of a dataset: likeness, sharpness, fine detail.

Measured where the image is decoded anyway (`trainer.data.images`), so that no image is decoded
twice. The limits that use them are in `trainer.data.image_checks`.
"""

import base64
import math
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageChops

THUMBNAIL = 16  # pixels a side
DETAIL_SIDE = 1024  # pixels, short side at which fine detail is measured, or less
BLUR_SIDE = 512  # pixels, short side at which sharpness is measured
LEAST_SIDE = 256  # pixels, short side; smaller images would all look blurred at 512
_TILE = 32  # pixels


class Measures(NamedTuple):
    """What the checks need to know of an image's pixels; as JSON a list."""

    thumbnail: str  # 16 x 16 RGB pixels, each the mean of its part, in base64
    sharpness: float | None  # variance of the Laplacian in the sharpest tiles, at 512 pixels
    lost_db: float | None  # PSNR after halving and doubling: high if there is no fine detail
    fineness: float | None  # sharpness at the measured size, relative to half of it

    @property
    def pixels(self) -> NDArray[np.uint8]:
        """The thumbnail, [16, 16, 3]."""
        flat = np.frombuffer(base64.b64decode(self.thumbnail), dtype=np.uint8)
        return flat.reshape(THUMBNAIL, THUMBNAIL, 3)


def measure(image: Image.Image) -> Measures:
    """Measures an upright RGB image. It may be a reduced one, if its sides are `DETAIL_SIDE`."""
    small = image.resize((THUMBNAIL, THUMBNAIL), Image.Resampling.BOX)
    thumbnail = base64.b64encode(np.asarray(small, dtype=np.uint8).tobytes()).decode()
    if min(image.size) < LEAST_SIDE:
        return Measures(thumbnail, None, None, None)

    grey = image.convert("L")
    if min(grey.size) > DETAIL_SIDE:
        grey = _scaled(grey, DETAIL_SIDE)
    half = _scaled(grey, min(grey.size) // 2)
    lost = ImageChops.difference(grey, half.resize(grey.size, Image.Resampling.BICUBIC))
    squared = sum(count * level * level for level, count in enumerate(lost.histogram()))
    error = max(squared / (grey.width * grey.height), 1e-3)
    sharp_half = _sharpness(half)
    at_blur_side = min(half.size) == BLUR_SIDE
    sharp = sharp_half if at_blur_side else _sharpness(_scaled(grey, BLUR_SIDE))
    return Measures(
        thumbnail,
        round(sharp, 1),
        round(10 * math.log10(255 * 255 / error), 1),
        round(_sharpness(grey) / max(sharp_half, 1e-3), 3),
    )


def _scaled(image: Image.Image, side: int) -> Image.Image:
    """The image with that short side."""
    scale = side / min(image.size)
    size = (max(side, round(image.width * scale)), max(side, round(image.height * scale)))
    filter = Image.Resampling.BICUBIC if scale > 1 else Image.Resampling.LANCZOS
    return image.resize(size, filter)


def _sharpness(grey: Image.Image) -> float:
    """The 90th percentile of the Laplacian's variance in tiles of 32 pixels.

    Of the sharpest tiles, since a sharp subject may be before a soft background.
    """
    a = np.asarray(grey, dtype=np.int16)
    laplacian = a[1:-1, :-2] + a[1:-1, 2:] + a[:-2, 1:-1] + a[2:, 1:-1] - 4 * a[1:-1, 1:-1]
    rows, columns = (length // _TILE for length in laplacian.shape)
    tiles = laplacian[: rows * _TILE, : columns * _TILE].reshape(rows, _TILE, columns, _TILE)
    means = tiles.mean(axis=(1, 3), dtype=np.float32)
    squares = np.einsum("abcd,abcd->ac", tiles, tiles, dtype=np.float32, casting="unsafe")
    return float(np.percentile(squares / _TILE**2 - means**2, 90))
