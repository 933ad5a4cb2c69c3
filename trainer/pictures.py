"""Decodes pictures as strangers send them: upright, RGB, 8 bits, or refused with the reason."""

import io

import numpy as np
from PIL import Image

from trainer.members import Unusable, what_is

IMAGE_FORMATS = ("JPEG", "PNG", "WEBP")

# Limits.
MAX_IMAGE_PIXELS = 89_478_485  # where Pillow begins to suspect a decompression bomb
MIN_SIDE = 8  # pixels; less is an icon or a tracking pixel, not a picture
MAX_ASPECT_RATIO = 8  # long / short; a centre crop would show an eighth of such a strip

# EXIF 2.32, tag 0x0112: how the stored picture must be turned to stand upright.
EXIF_ORIENTATION = 0x0112
UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


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


def decode(data: bytes) -> tuple[Image.Image, bool]:
    """The whole picture as `Example.image` will give it, and whether it is an animation."""
    try:
        with Image.open(io.BytesIO(data), formats=IMAGE_FORMATS) as image:
            # MPO is how phones store a photo with its depth map or a second view: not a film.
            moves = getattr(image, "is_animated", False) and image.format != "MPO"
            return upright_rgb(image), moves
    except Exception as error:  # hostile pixels make Pillow raise whatever it trips over
        raise Unusable(
            f"is truncated or damaged ({error}); export it again or remove it"
        ) from error


def upright_rgb(image: Image.Image) -> Image.Image:
    image.load()
    try:
        orientation = image.getexif().get(EXIF_ORIENTATION)
    except Exception:  # broken EXIF does no harm to the pixels
        orientation = None

    if image.mode.startswith("I"):  # 16-bit greyscale, which convert("RGB") would clip
        pixels_HW = np.asarray(image).astype(np.float32) / 257
        image = Image.fromarray(pixels_HW.round().clip(0, 255).astype(np.uint8))
    if image.has_transparency_data:
        rgba = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba)
    image = image.convert("RGB")
    return image.transpose(UPRIGHT[orientation]) if orientation in UPRIGHT else image
