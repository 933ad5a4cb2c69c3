"""The views in which an image is trained on: its buckets, crops, and mirror images."""

from typing import NamedTuple

from trainer.data import Bucket, Example, crop_shifts, nearest_bucket
from trainer.settings import Settings


class View(NamedTuple):
    """One of the ways in which an image is trained on."""

    bucket: Bucket
    shift: float  # of the crop
    mirrored: bool
    repeats: int  # so that all images and resolutions count alike


def views_of(example: Example, settings: Settings, multiple: int) -> list[View]:
    """All views of an image: those that are not mirrored first."""
    views, size = [], (example.width, example.height)
    for mirrored in (False, True) if settings.horizontal_flip else (False,):
        for edge in settings.resolutions:
            bucket = nearest_bucket(*size, edge, multiple)
            shifts = crop_shifts(*size, bucket, settings.crop_jitter)
            repeats = 3 // len(shifts) if settings.crop_jitter else 1
            views += [View(bucket, shift, mirrored, repeats) for shift in shifts]
    return views
