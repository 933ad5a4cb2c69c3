"""Masks: the part of each image that is trained on.

White is trained on, black hardly (`OUTSIDE`), and grey in between. A mask is a file next to
the image (`trainer.data.auxiliary_images`), or the image's own transparency.
"""

import logging
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import NamedTuple

from inference.image_limits import ImageLimit
from inference.progress import Progress
from trainer.data.example import Example, decode_mask
from trainer.data.findings import Finding
from trainer.data.images import MAX_TOTAL_PIXELS, probe
from trainer.data.members import Unusable, listed
from trainer.data.threads import in_threads

# The weight of what is black, relative to that without a mask. With 0, nothing would hold the model
# to an image there: on the miniature it fills the image with copies of the subject. As a share of
# what is white (0.1 in OneTrainer), a small subject would leave half of the loss to the background.
OUTSIDE = 0.1
BLACK = 25  # of 255: all darker masks are black; compression does not keep it exactly
OFF = "; correct it, or set masks to off"


class Masked(NamedTuple):
    """The examples of a dataset with the masks that are used; the others have none."""

    examples: list[Example]
    problems: list[Finding]
    notes: list[Finding]


def with_masks(examples: Sequence[Example], source: str, check: bool = True) -> Masked:
    """Checks the masks of a dataset, and decides whether they are used.

    examples: with the masks that belong to them by their names.
    source: `auto`, the mask files, if all images have one; `alpha`, the images' transparency;
        `off`, none.
    check: whether mask files are decoded, to find faults in them.
    """
    bare = [replace(each, mask_file="", mask=b"") for each in examples]
    if source == "alpha" and examples:
        return _transparency(bare)
    missing = [each.name for each in examples if not each.mask_file]
    if len(missing) == len(examples):
        return Masked(bare, [], [])
    count = f"{len(examples) - len(missing)} of {len(examples)} images have a mask"
    if source == "off":
        text = f"masks are not used: {count}, but masks is off, as by default with the preset style"
        return Masked(bare, [], [Finding(text, level=logging.INFO)])
    if missing:
        text = f"masks are not used: {count}, and these have none"
        return Masked(bare, [], [Finding.of_all(text, missing, check="no-mask")])
    problems = list(_file_problems(examples)) if check else []
    text = f"masks are used: every image has one. {_effect('What is black')}"
    return Masked([*examples], problems, [Finding(text, level=logging.INFO)])


def _effect(what: str) -> str:
    return f"{what} has {OUTSIDE:.0%} of its usual weight"


def _transparency(examples: Sequence[Example]) -> Masked:
    """The examples with their own transparency as masks; those without any have none."""

    def darkest_and_lightest(example: Example) -> tuple[int, int] | str:
        try:
            low, high = decode_mask(example.data, transparency=True).getextrema()
        except Exception as error:  # Pillow may raise any exception on malformed images
            return f"its transparency cannot be read ({error}){OFF}"
        return int(low), int(high)  # type: ignore[arg-type]

    found = list(in_threads(darkest_and_lightest, examples))
    masked, problems, opaque = [], [], []
    for example, extremes in zip(examples, found, strict=True):
        if isinstance(extremes, str):
            problems.append(Finding.of(example.name, extremes))
        elif extremes[0] == 255:
            opaque.append(example.name)
            masked.append(example)
        else:
            masked.append(replace(example, mask_file=example.name, mask=example.data))
            if extremes[1] <= BLACK:
                text = f"is transparent everywhere, so nothing of it would be learned{OFF}"
                problems.append(Finding.of(example.name, text))
    if len(opaque) == len(examples):
        text = "masks is alpha, but no image has transparency; set masks to auto or off"
        return Masked([*examples], [Finding(text)], [])
    text = f"transparency is the mask of {len(examples) - len(opaque)} of {len(examples)} images. "
    notes = [Finding(text + _effect("What is transparent"), level=logging.INFO)]
    if opaque:
        notes.append(Finding.of_all("without transparency, so trained on as a whole", opaque))
    return Masked(masked, problems, notes)


def _file_problems(examples: Sequence[Example]) -> Iterator[Finding]:
    """Why mask files cannot be used."""
    sizes: dict[str, tuple[int, int]] = {}  # as stored, by the image's name
    readable, pixels = [], 0
    for each in examples:
        try:
            width, height = probe(bytes(each.mask))
        except Unusable as error:
            yield _problem(each, str(error))
            continue
        pixels += width * height
        if pixels > MAX_TOTAL_PIXELS:
            yield Finding(
                f"the masks contain more than {MAX_TOTAL_PIXELS:,} pixels up to {each.mask_file}; "
                "scale them down, or set masks to off"
            )
            break
        readable.append(each)
        sizes[each.name] = width, height
    with Progress(total=len(readable), desc="reading masks", unit="mask") as progress:
        for each, found in zip(readable, in_threads(_fault, readable), strict=True):
            if found:
                yield _problem(each, found)
            progress.update()


def _fault(example: Example) -> str:
    """Why a mask cannot be used; empty if it can."""
    try:
        mask = decode_mask(example.mask, transparency=False)
    except ImageLimit as error:
        return f"{error}{OFF}"
    except Exception as error:  # Pillow may raise any exception on malformed images
        return f"is truncated or damaged ({error}){OFF}"
    width, height = mask.size
    # Up to a pixel: a smaller mask was rounded.
    off_width = abs(width - height * example.width / example.height)
    off_height = abs(height - width * example.height / example.width)
    if min(off_width, off_height) > 1:
        return (
            f"is {width}x{height} pixels, but {example.name} is {example.width}x{example.height}; "
            f"a mask needs the aspect ratio of its image{OFF}"
        )
    if int(mask.getextrema()[1]) <= BLACK:  # type: ignore[arg-type]
        return f"is black, so nothing of {example.name} would be learned; white is learned{OFF}"
    return ""


def _problem(example: Example, why: str) -> Finding:
    text = f"{example.mask_file}: {why}"
    return Finding(text, (example.name, example.mask_file), text)


def unused(names: Sequence[str], examples: Sequence[Example]) -> list[Finding]:
    """Names the masks among the files that are not used, if others are."""
    used = {each.mask_file for each in examples} - {""}
    rest = [name for name in names if name not in used]
    if not used or not rest:
        return []
    return [
        Finding(
            "masks that are not used, because they belong to no image or to one with another mask, "
            f"or because their names say that white is not the subject: {listed(rest)}"
        )
    ]
