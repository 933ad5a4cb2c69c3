"""Aspect-ratio buckets: the sizes that images are resized to, so that batches share a shape.

Independent of captions, latents and models.
"""

import functools
import logging
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from trainer.data.dataset import Example
from trainer.data.findings import Finding
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
    """Logs the warnings of `upscaled`."""
    for finding in upscaled(examples, resolution, multiple):
        log.warning("%s", finding.text)


def upscaled(examples: Sequence[Example], resolution: int, multiple: int) -> Iterator[Finding]:
    """Warnings of images that are smaller than their bucket at `resolution`, smallest first, with
    the factor by which they are upscaled. Images that are far too small get a separate warning."""
    factors = []
    for example in examples:
        bucket = nearest_bucket(example.width, example.height, resolution, multiple)
        factors.append((cover(example.width, example.height, bucket), example))
    factors.sort(key=lambda each: -each[0])
    far = [each for each in factors if each[0] >= FAR_TOO_SMALL]
    enlarged = [each for each in factors if UPSCALING_WORTH_A_WARNING < each[0] < FAR_TOO_SMALL]
    smaller = f"smaller than resolution {resolution} and"
    for few, consequence in (
        (far, f"far {smaller} have almost no detail to learn; remove them"),
        (enlarged, f"{smaller} are upscaled, so the result may look soft"),
    ):
        if few:
            beside = f"{consequence}, use larger images or a lower resolution"
            shown = listed([f"{e.name} ({e.width}x{e.height}, {f:.2f}x)" for f, e in few])
            yield Finding(
                f"{len(few)} of {len(examples)} images are {beside}: {shown}",
                tuple(each.name for _, each in few),
                beside,
            )


def cover(width: int, height: int, bucket: Bucket) -> float:
    """The smallest factor by which `width` x `height` covers the bucket."""
    return max(bucket.width / width, bucket.height / height)


def crop(width: int, height: int, bucket: Bucket) -> tuple[float, float, float, float]:
    """Left, top, right and bottom of the part of an image that its bucket takes, in its pixels."""
    scale = cover(width, height, bucket)
    cut_width, cut_height = bucket.width / scale, bucket.height / scale
    left, top = (width - cut_width) / 2, (height - cut_height) / 2
    return (
        max(left, 0.0),
        max(top, 0.0),
        min(left + cut_width, width),
        min(top + cut_height, height),
    )
