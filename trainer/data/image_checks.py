"""Checks images: near-duplicates, blur, enlargement, size, crop and background.

The limits were measured on 20 images; docs/datasets.md says on which.
"""

import logging
from collections.abc import Iterator, Sequence

from trainer.data.buckets import cover, crop, nearest_bucket
from trainer.data.dataset import Example
from trainer.data.findings import Finding
from trainer.data.measures import DETAIL_SIDE, Measures
from trainer.data.members import listed
from trainer.data.similarity import alike, same_background, stacked

# `Measures.sharpness`: sharp images have 164 to 7,650, blurred by 2 of 512 pixels 3 to 33.
BLURRED = 80
# Of images that were enlarged twice. Both, since a smooth image also loses little.
ENLARGED_DB = 40  # `Measures.lost_db` and above: 37 to 53, sharp images 24 to 43 (one of 47)
ENLARGED_FINENESS = 0.25  # `Measures.fineness` and below: 0.11 to 0.25, others 0.22 to 2.2 (0.13)
LEAST_FOR_ENLARGED = 512  # pixels, short side; smaller images are smaller than the bucket anyway
KEPT = 0.85  # of the area, within the bucket

# Below this factor upscaling is not visible, and every second photo would be named.
UPSCALING_WORTH_A_WARNING = 1.05
# From this factor on, 15 of 16 pixels or more of the training image are interpolated.
FAR_TOO_SMALL = 4


def image_checks(
    examples: Sequence[Example], resolution: int | None, multiple: int
) -> Iterator[Finding]:
    """Warnings and suggestions about images.

    resolution: the largest of the run, in pixels; None if it is not known yet. Then nothing is said
        about sizes. multiple: `size_multiple` of the base model.
    """
    yield from _similar(examples)
    yield from _soft(examples, resolution)
    if resolution is not None:
        yield from upscaled(examples, resolution, multiple)
        yield from _cropped(examples, resolution, multiple)


def _measured(examples: Sequence[Example]) -> list[tuple[Example, Measures]]:
    return [(each, each.measures) for each in examples if each.measures is not None]


def _similar(examples: Sequence[Example]) -> Iterator[Finding]:
    known = _measured(examples)
    pixels = stacked([measures.pixels for _, measures in known])
    names = [example.name for example, _ in known]
    found = alike(pixels)
    for group in found.nearly_the_same:
        if len(those := _without_edited([known[each][0] for each in group])) > 1:
            yield Finding.of_all(
                f"{len(those)} images are nearly the same, so this view counts more than others; "
                "keep one",
                those,
                check="near-duplicates",
            )
    for group in found.alike:
        those = _without_edited([known[each][0] for each in group])
        if group not in found.nearly_the_same and len(those) > 1:
            yield Finding.of_all(
                f"{len(those)} images are alike; if they show one moment, keep the best",
                those,
                check="alike",
                level=logging.INFO,
            )
    if background := same_background(pixels):
        yield Finding.of_all(
            f"{len(background)} of {len(names)} images have the same border; a background "
            "that is always there is learned with the subject: name it in the captions, or add "
            "images in other places",
            [names[each] for each in background],
            check="same-background",
            level=logging.INFO,
        )


def _without_edited(examples: Sequence[Example]) -> list[str]:
    """The names of the images, without control images of others of them."""
    edited = {control.name for each in examples for control in each.controls}
    return [each.name for each in examples if each.name not in edited]


def _soft(examples: Sequence[Example], resolution: int | None) -> Iterator[Finding]:
    """Images without the detail that their size promises."""
    known, blurred = _measured(examples), list[str]()
    for example, measures in known:
        if measures.sharpness is not None and measures.sharpness < BLURRED:
            blurred.append(example.name)
    if blurred:
        yield Finding.of_all(
            "blurred even in the sharpest parts, and that is learned too; use sharper images",
            blurred,
            check="blurred",
        )
    enlarged = [
        example.name
        for example, measures in known
        if example.name not in blurred and _is_enlarged(example, measures, resolution)
    ]
    if enlarged:
        yield Finding.of_all(
            "without fine detail, as if enlarged from half the size or less; use the originals",
            enlarged,
            check="enlarged",
        )


def _is_enlarged(example: Example, measures: Measures, resolution: int | None) -> bool:
    side = min(example.width, example.height)
    if measures.lost_db is None or measures.fineness is None or side < LEAST_FOR_ENLARGED:
        return False
    if resolution is not None and resolution <= min(side, DETAIL_SIDE) / 2:
        return False  # that much detail is there
    return measures.lost_db >= ENLARGED_DB and measures.fineness <= ENLARGED_FINENESS


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
        (far, f"far {smaller} have almost no detail to learn; remove them, or"),
        (enlarged, f"{smaller} upscaled, so the result may look soft;"),
    ):
        if few:
            beside = f"{consequence} use larger images or a lower resolution"
            shown = listed([f"{e.name} ({e.width}x{e.height}, {f:.2f}x)" for f, e in few])
            yield Finding(
                f"{len(few)} of {len(examples)} images are {beside}: {shown}",
                tuple(each.name for _, each in few),
                beside,
                check="small",
            )


def _cropped(examples: Sequence[Example], resolution: int, multiple: int) -> Iterator[Finding]:
    cut = []
    for example in examples:
        bucket = nearest_bucket(example.width, example.height, resolution, multiple)
        left, top, right, bottom = crop(example.width, example.height, bucket)
        kept = (right - left) * (bottom - top) / (example.width * example.height)
        if kept < KEPT:
            cut.append((1 - kept, example))
    if cut:
        cut.sort(key=lambda each: -each[0])
        beside = (
            f"more than {1 - KEPT:.0%} of the area is cut off to fit a bucket, which has at most "
            "1:2; crop it around what matters"
        )
        shown = listed([f"{e.name} ({e.width}x{e.height}, {lost:.0%})" for lost, e in cut])
        yield Finding(
            f"{len(cut)} of {len(examples)} images: {beside}: {shown}",
            tuple(each.name for _, each in cut),
            beside,
            check="cropped",
        )
