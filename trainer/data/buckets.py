"""Aspect-ratio buckets: the sizes that images are resized to, so that batches share a shape.

Independent of captions, latents and models.
"""

import functools
import math
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

# Long side over short side, as of cameras, phones and screens. Each is used upright too.
ASPECT_RATIOS = (1, 5 / 4, 4 / 3, 3 / 2, 16 / 9, 2)

# With a coarse multiple, a small bucket can be far from its ratio (16x64 for 2:1 of 32 pixels).
# Buckets beyond this ratio are not used.
MAX_BUCKET_RATIO = 2.2

LEAST_SHIFT = 0.02  # of a bucket's side, between two crops of an image


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


def bucket_sizes(
    images: Iterable[tuple[int, int]], resolutions: Iterable[int], multiple: int
) -> list[int]:
    """How many images each bucket has; `images` are widths and heights, each at all resolutions."""
    edges = tuple(resolutions)
    found = Counter(
        (edge, nearest_bucket(*size, edge, multiple)) for size in images for edge in edges
    )
    return list(found.values())


def cover(width: int, height: int, bucket: Bucket) -> float:
    """The smallest factor by which `width` x `height` covers the bucket."""
    return max(bucket.width / width, bucket.height / height)


def crop(
    width: int, height: int, bucket: Bucket, shift: float = 0.0
) -> tuple[float, float, float, float]:
    """Left, top, right and bottom of the part of an image that its bucket takes, in its pixels.

    shift: from the center towards the left or upper end (-1), or the other one (1).
    """
    scale = cover(width, height, bucket)
    cut_width, cut_height = bucket.width / scale, bucket.height / scale
    left, top = (width - cut_width) / 2 * (1 + shift), (height - cut_height) / 2 * (1 + shift)
    return (
        max(left, 0.0),
        max(top, 0.0),
        min(left + cut_width, width),
        min(top + cut_height, height),
    )


def crop_shifts(width: int, height: int, bucket: Bucket, jitter: float) -> tuple[float, ...]:
    """The crops of an image for `crop_jitter`: at the center and shifted by that much to both ends.

    Only one if they would be nearly the same.
    """
    scale = cover(width, height, bucket)
    margin = max(width * scale / bucket.width, height * scale / bucket.height) - 1
    return (0.0, -jitter, jitter) if jitter * margin / 2 >= LEAST_SHIFT else (0.0,)
