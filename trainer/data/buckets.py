"""Aspect-ratio buckets: the sizes that images are resized to, so that batches share a shape.

Independent of captions, latents and models.
"""

import functools
import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass

from trainer.data.dataset import Example
from trainer.data.members import listed

log = logging.getLogger(__name__)

# Long side over short side, as of cameras, phones and screens. Each is used upright too.
ASPECT_RATIOS = (1, 5 / 4, 4 / 3, 3 / 2, 16 / 9, 2)

# With a coarse multiple, a small bucket can be far from its ratio (16x64 for 2:1 of 32 pixels).
# Buckets beyond this ratio are not used.
MAX_BUCKET_RATIO = 2.2

# Below this factor upscaling is not visible, and every second photo would be named.
UPSCALING_WORTH_A_WARNING = 1.05
# From this factor on, 15 of 16 pixels or more of the training image are interpolated.
FAR_TOO_SMALL = 4


@dataclass(frozen=True, order=True)
class Bucket:
    """A size in pixels, a multiple of the base's `resolution_multiple`."""

    width: int
    height: int


@functools.cache
def buckets_for(resolution: int, multiple: int) -> tuple[Bucket, ...]:
    """All buckets around `resolution` (edge of the square one, in pixels), sorted.

    Every bucket has at most `resolution`² pixels and sides that are multiples of `multiple`, with
    ratios from about 1:2 to 2:1. A resolution is rounded down to a multiple. Raises ValueError if
    it is below the first.
    """
    edge = resolution // multiple * multiple
    if edge <= 0:
        raise ValueError(
            f"resolution {resolution} is too small for this base model; use {multiple} or more"
        )

    buckets = set()
    for ratio in ASPECT_RATIOS:
        short = max(1, round(edge / math.sqrt(ratio) / multiple)) * multiple
        long = edge * edge // short // multiple * multiple
        if long <= short * MAX_BUCKET_RATIO:
            buckets |= {Bucket(long, short), Bucket(short, long)}
    return tuple(sorted(buckets))


def nearest_bucket(width: int, height: int, resolution: int, multiple: int) -> Bucket:
    """The bucket around `resolution` with the nearest aspect ratio to `width` x `height`."""
    log_ratio = math.log(width / height)
    return min(
        buckets_for(resolution, multiple),
        key=lambda bucket: abs(math.log(bucket.width / bucket.height) - log_ratio),
    )


def warn_upscaled(examples: Sequence[Example], resolution: int, multiple: int) -> None:
    """Warns of images that are smaller than their bucket at `resolution`, smallest first, with the
    factor by which they are upscaled. Images that are far too small get a separate warning."""
    factors = []
    for example in examples:
        bucket = nearest_bucket(example.width, example.height, resolution, multiple)
        factors.append((cover(example.width, example.height, bucket), example))
    factors.sort(key=lambda each: -each[0])
    far = [each for each in factors if each[0] >= FAR_TOO_SMALL]
    enlarged = [each for each in factors if UPSCALING_WORTH_A_WARNING < each[0] < FAR_TOO_SMALL]
    for few, consequence in (
        (far, "far smaller than resolution %d and have almost no detail to learn; remove them"),
        (enlarged, "smaller than resolution %d and are upscaled, so the result may look soft"),
    ):
        if few:
            log.warning(
                f"%d of %d images are {consequence}, use larger images or a lower resolution: %s",
                *(len(few), len(examples), resolution),
                listed([f"{e.name} ({e.width}x{e.height}, {f:.2f}x)" for f, e in few]),
            )


def cover(width: int, height: int, bucket: Bucket) -> float:
    """The smallest factor by which `width` x `height` covers the bucket."""
    return max(bucket.width / width, bucket.height / height)
