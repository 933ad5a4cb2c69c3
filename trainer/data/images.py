"""Checks images, which are untrusted input, with reasons for those that are refused."""

import io
from typing import NamedTuple

from PIL import Image

from inference.image_decoding import IMAGE_FORMATS, MAX_JPEG_SCANS, has_too_many_scans, upright_srgb
from trainer.data.measures import DETAIL_SIDE, Measures, measure
from trainer.data.members import Unusable, what_is

# Limits.
MAX_IMAGE_PIXELS = 89_478_485  # where Pillow begins to suspect a decompression bomb
MIN_SIDE = 8  # pixels; less is an icon or a tracking pixel
MAX_ASPECT_RATIO = 8  # long / short; a square crop would show only an eighth of the image


def probe(data: bytes) -> tuple[int, int]:
    """Width and height in the header, checked before any pixel is decoded. Raises Unusable."""
    try:
        with Image.open(io.BytesIO(data), formats=IMAGE_FORMATS) as image:
            width, height = image.size
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        width = height = MAX_IMAGE_PIXELS
    except Exception as error:  # Pillow may raise any exception on malformed images
        raise Unusable(
            f"cannot be opened as an image ({what_is(data)}); "
            "export it again as JPEG, PNG or WebP, or remove it"
        ) from error
    if width * height > MAX_IMAGE_PIXELS:
        raise Unusable(f"has more than {MAX_IMAGE_PIXELS:,} pixels; scale it down")
    if min(width, height) < MIN_SIDE:
        raise Unusable(
            f"is {width}x{height} pixels, too small for training; "
            f"remove it or use one of {MIN_SIDE} pixels or more on each side"
        )
    if max(width, height) > MAX_ASPECT_RATIO * min(width, height):
        raise Unusable(
            f"is {width}x{height} pixels, more extreme than 1:{MAX_ASPECT_RATIO}; "
            "crop it around the subject"
        )
    return width, height


class Checked(NamedTuple):
    """Properties of a usable image."""

    width: int  # pixels, upright
    height: int  # pixels, upright
    moves: bool  # an animation, of which the first frame is used
    bad_profile: bool  # its color profile is broken and ignored
    measures: Measures | None = None  # None: not decoded yet


def check(data: bytes) -> Checked:
    """Decodes the whole file as a check, and measures it. Raises Unusable if that fails."""
    if has_too_many_scans(data):
        raise Unusable(f"has more than {MAX_JPEG_SCANS} scans; export it again or remove it")
    try:
        with Image.open(io.BytesIO(data), formats=IMAGE_FORMATS) as image:
            # MPO is a photo with a depth map or a second view, not an animation.
            moves = getattr(image, "is_animated", False) and image.format != "MPO"
            width, height = image.size
            # Decoding a JPEG at a part of its size reads the whole file too.
            if width == height or abs(width - height) >= 8:  # else both sides may become equal
                image.draft(None, (DETAIL_SIDE, DETAIL_SIDE))
            stored = image.size
            upright, bad_profile = upright_srgb(image)
            if upright.size != stored:  # rotated
                width, height = height, width
            return Checked(width, height, moves, bad_profile, measure(upright))
    except Exception as error:  # Pillow may raise any exception on malformed images
        raise Unusable(
            f"is truncated or damaged ({error}); export it again or remove it"
        ) from error
