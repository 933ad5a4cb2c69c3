"""Checks images, which are untrusted input, with reasons for those that are refused."""

import re
import warnings
from contextlib import suppress
from typing import NamedTuple

from PIL import Image, UnidentifiedImageError

from inference.image_decoding import READABLE, is_animation, open_image, over, upright_srgb
from inference.image_limits import ImageLimit
from trainer.data.measures import DETAIL_SIDE, Measures, measure
from trainer.data.members import Unusable, what_is

# Limits.
MAX_IMAGE_PIXELS = 89_478_485  # where Pillow begins to suspect a decompression bomb
MAX_TOTAL_PIXELS = 30_000_000_000  # 1,250 photos of 24 megapixels; minutes of decoding
MIN_SIDE = 8  # pixels; less is an icon or a tracking pixel
MAX_ASPECT_RATIO = 8  # long / short; a square crop would show only an eighth of the image


def probe(data: bytes) -> tuple[int, int]:
    """Width and height in the header, checked before any pixel is decoded. Raises Unusable."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with open_image(data) as image:
                width, height = image.size
    except ImageLimit as error:
        raise Unusable(str(error)) from error
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        width = height = MAX_IMAGE_PIXELS
    except Exception as error:  # Pillow may raise any exception on malformed images
        # Its UnidentifiedImageError names only an object in memory.
        why = what_is(data) if isinstance(error, UnidentifiedImageError) else error
        raise Unusable(
            f"cannot be opened as an image ({why}); "
            f"it must be {READABLE}; export it again, or remove it"
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
    moves: bool  # several frames or pages, of which the first is used
    bad_profile: bool  # its color profile is broken and ignored
    measures: Measures | None = None  # None: not decoded yet
    described: bool = False  # the file contains a description, keywords or a prompt
    transparent: bool = False  # some pixels are


def check(data: bytes) -> Checked:
    """Decodes the whole file as a check, and measures it. Raises Unusable if that fails."""
    try:
        with open_image(data) as image:
            moves = is_animation(image)
            width, height = image.size
            # Decoding a JPEG at a part of its size reads the whole file too.
            if width == height or abs(width - height) >= 8:  # else both sides may become equal
                image.draft(None, (DETAIL_SIDE, DETAIL_SIDE))
            stored = image.size
            upright, bad_profile = upright_srgb(image, None)
            transparent = False
            if upright.mode == "RGBA":
                alpha = upright.getchannel("A")
                transparent = alpha.getextrema() != (255, 255)
                upright = over(upright.convert("RGB"), alpha)
            if upright.size != stored:  # rotated
                width, height = height, width
            measures = measure(upright)
            # Only now: it decodes a PNG, and hides that this failed.
            described = _is_described(image)
            return Checked(width, height, moves, bad_profile, measures, described, transparent)
    except ImageLimit as error:
        raise Unusable(str(error)) from error
    except Exception as error:  # Pillow may raise any exception on malformed images
        raise Unusable(
            f"is truncated or damaged ({error}); export it again or remove it"
        ) from error


# Texts in PNG files, of the PNG standard and of programs that generate images.
_TEXTS = ("Description", "parameters", "prompt")
_EXIF = (0x010E, 0x9C9B, 0x9C9C, 0x9C9E)  # ImageDescription, XPTitle, XPComment, XPKeywords
_MAX_XMP = 1 << 20  # of XMP that is searched
_XMP = re.compile(
    rb"<(?:dc:description|dc:subject|lr:hierarchicalSubject)\b.{0,400}?<rdf:li", re.DOTALL
)


def _is_described(image: Image.Image) -> bool:
    """Whether a file says what is in the image: in EXIF, XMP or the texts of a PNG."""
    info = image.info
    if any(isinstance(info.get(name), str) and info[name].strip() for name in _TEXTS):
        return True
    xmp = info.get("xmp") or info.get("XML:com.adobe.xmp") or b""
    xmp = xmp[:_MAX_XMP]
    if _XMP.search(xmp.encode(errors="replace") if isinstance(xmp, str) else bytes(xmp)):
        return True
    with suppress(Exception):  # broken EXIF
        exif = image.getexif()
        return any(str(exif.get(tag) or "").strip() for tag in _EXIF)
    return False
