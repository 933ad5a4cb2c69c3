"""Aspect-ratio buckets: the few sizes that pictures are brought to, so that batches share a shape.

Knows sizes and pixels only, nothing of captions, latents or models.
"""

import functools
import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass

from trainer.data.dataset import Example
from trainer.data.members import listed

log = logging.getLogger(__name__)

# Long side over short side, as cameras, phones and screens make them. Each is used upright too.
ASPECT_RATIOS = (1, 5 / 4, 4 / 3, 3 / 2, 16 / 9, 2)

# A coarse multiple can push a small bucket far from the ratio it was meant for (16x64 for 2:1 of
# 32 pixels). Past this one it would only cut pictures to strips.
MAX_BUCKET_RATIO = 2.2

# Below this factor enlarging is not visible, and every second photo would be named.
UPSCALING_WORTH_A_WARNING = 1.05
# From this factor on, 15 of 16 pixels or more of the training image are interpolated.
FAR_TOO_SMALL = 4


@dataclass(frozen=True, order=True)
class Bucket:
    """A size in pixels; both sides are multiples of the base's resolution multiple."""

    width: int
    height: int


@functools.cache
def buckets_for(resolution: int, multiple: int) -> tuple[Bucket, ...]:
    """All buckets around `resolution` (edge of the square one, in pixels), sorted.

    Every bucket has at most `resolution`² pixels and sides that are multiples of `multiple`; the
    ratios run from about 1:2 to 2:1. A resolution between two multiples counts as the lower one.
    Raises ValueError if it is below the first.
    """
    edge = resolution // multiple * multiple
    if edge <= 0:
        raise ValueError(
            f"resolution {resolution} is too small for this base; use {multiple} or more"
        )

    buckets = set()
    for ratio in ASPECT_RATIOS:
        short = max(1, round(edge / math.sqrt(ratio) / multiple)) * multiple
        long = edge * edge // short // multiple * multiple
        if long <= short * MAX_BUCKET_RATIO:
            buckets |= {Bucket(long, short), Bucket(short, long)}
    return tuple(sorted(buckets))


def nearest_bucket(width: int, height: int, resolution: int, multiple: int) -> Bucket:
    """The bucket around `resolution` that cuts least from a picture of `width` x `height`."""
    log_ratio = math.log(width / height)
    return min(
        buckets_for(resolution, multiple),
        key=lambda bucket: abs(math.log(bucket.width / bucket.height) - log_ratio),
    )


def warn_upscaled(examples: Sequence[Example], resolution: int, multiple: int) -> None:
    """Names the images that are smaller than their bucket at `resolution`, smallest first, each
    with the factor by which it will be enlarged. Those that are far too small come by themselves.
    """
    factors = []
    for example in examples:
        bucket = nearest_bucket(example.width, example.height, resolution, multiple)
        factors.append((cover(example.width, example.height, bucket), example))
    factors.sort(key=lambda each: -each[0])
    far = [each for each in factors if each[0] >= FAR_TOO_SMALL]
    enlarged = [each for each in factors if UPSCALING_WORTH_A_WARNING < each[0] < FAR_TOO_SMALL]
    for few, consequence in (
        (far, "far smaller than resolution %d and have next to no detail to learn; remove them"),
        (enlarged, "smaller than resolution %d and will be enlarged, so the result may look soft"),
    ):
        if few:
            log.warning(
                f"%d of %d images are {consequence}, use larger originals or a lower resolution: "
                "%s",
                *(len(few), len(examples), resolution),
                listed([f"{e.name} ({e.width}x{e.height}, {f:.2f}x)" for f, e in few]),
            )


def cover(width: int, height: int, bucket: Bucket) -> float:
    """The factor that makes `width` x `height` just cover the bucket."""
    return max(bucket.width / width, bucket.height / height)
