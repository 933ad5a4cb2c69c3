"""Checks pictures as strangers send them: what they are, or the reason why they are refused."""

import io
from typing import NamedTuple

from PIL import Image

from inference.image_decoding import IMAGE_FORMATS, MAX_JPEG_SCANS, has_too_many_scans, upright_srgb
from trainer.data.members import Unusable, what_is

# Limits.
MAX_IMAGE_PIXELS = 89_478_485  # where Pillow begins to suspect a decompression bomb
MIN_SIDE = 8  # pixels; less is an icon or a tracking pixel, not a picture
MAX_ASPECT_RATIO = 8  # long / short; a centre crop would show an eighth of such a strip


def probe(data: bytes) -> tuple[int, int]:
    """Width and height as the header states them, checked before any pixel is decoded."""
    try:
        with Image.open(io.BytesIO(data), formats=IMAGE_FORMATS) as image:
            width, height = image.size
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        width = height = MAX_IMAGE_PIXELS
    except Exception as error:  # hostile headers make Pillow raise whatever it trips over
        raise Unusable(
            f"cannot be opened as a picture ({what_is(data)}); "
            "export it again as JPEG, PNG or WebP, or remove it"
        ) from error
    if width * height > MAX_IMAGE_PIXELS:
        raise Unusable(f"has more than {MAX_IMAGE_PIXELS:,} pixels; scale it down")
    if min(width, height) < MIN_SIDE:
        raise Unusable(
            f"is {width}x{height} pixels, too small to learn from; "
            f"remove it or use one of {MIN_SIDE} pixels or more on each side"
        )
    if max(width, height) > MAX_ASPECT_RATIO * min(width, height):
        raise Unusable(
            f"is {width}x{height} pixels, more extreme than 1:{MAX_ASPECT_RATIO}; "
            "crop it around the subject"
        )
    return width, height


class Checked(NamedTuple):
    """What is known of a picture that can be used, and what is worth a warning."""

    width: int  # pixels, upright
    height: int  # pixels, upright
    moves: bool  # an animation, of which the first frame is used
    bad_profile: bool  # its colour profile is broken and is ignored


def check(data: bytes) -> Checked:
    """Decodes the whole file and keeps no pixel. Raises Unusable where they cannot be had."""
    if has_too_many_scans(data):
        raise Unusable(f"has more than {MAX_JPEG_SCANS} scans; export it again or remove it")
    try:
        with Image.open(io.BytesIO(data), formats=IMAGE_FORMATS) as image:
            # MPO is how phones store a photo with its depth map or a second view: not a film.
            moves = getattr(image, "is_animated", False) and image.format != "MPO"
            width, height = image.size
            # At an eighth of its size a JPEG is read to its end, too, and the same is refused.
            if width == height or abs(width - height) >= 8:  # else both sides may become the same
                image.draft(None, (1, 1))
            stored = image.size
            upright, bad_profile = upright_srgb(image)
            if upright.size != stored:  # it lay on its side
                width, height = height, width
            return Checked(width, height, moves, bad_profile)
    except Exception as error:  # hostile pixels make Pillow raise whatever it trips over
        raise Unusable(
            f"is truncated or damaged ({error}); export it again or remove it"
        ) from error
