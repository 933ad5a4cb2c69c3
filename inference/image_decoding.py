"""Decodes images: every mode, EXIF orientation and color profile is converted to upright sRGB."""

import io
from contextlib import suppress

import numpy as np
from PIL import Image, ImageCms, ImageOps

# Pillow would try all its formats, and some of those run other programs.
IMAGE_FORMATS = ("JPEG", "PNG", "WEBP")
MAX_JPEG_SCANS = 200  # progressive files have about ten; each costs a pass over all pixels


def has_too_many_scans(data: bytes) -> bool:
    """Whether a JPEG would take minutes to decode: a small file can have millions of scans."""
    # In JPEG's compressed data 0xFF is followed by 0, so this counts only markers.
    return data.startswith(b"\xff\xd8") and data.count(b"\xff\xda") > MAX_JPEG_SCANS


def upright_srgb(image: Image.Image) -> tuple[Image.Image, bool]:
    """Converts an image to upright 8-bit sRGB; also returns whether its color profile was invalid.

    Transparency is composed over white; of an animation, the first frame is used. `image` itself
    is turned upright. Pillow may raise any exception on malformed images: catch `Exception`.
    """
    image.load()
    with suppress(Exception):  # broken EXIF: the pixels are still valid
        ImageOps.exif_transpose(image, in_place=True)  # in place, so that no copy is made
    profile = image.info.get("icc_profile")

    if image.mode.startswith("I"):  # 16-bit grayscale, which convert("RGB") would clip
        pixels_HW = np.asarray(image).astype(np.float32) / 257
        image = Image.fromarray(pixels_HW.round().clip(0, 255).astype(np.uint8))
    alpha = image.convert("RGBA").getchannel("A") if image.has_transparency_data else None
    if image.mode != "CMYK":
        image = image.convert("L" if image.mode in ("1", "L", "LA") else "RGB")
    image, bad_profile = _srgb(image, profile)
    if alpha is not None:
        white = Image.new("RGB", image.size, "white")
        white.paste(image, mask=alpha)
        image = white
    return image, bad_profile


def _srgb(image: Image.Image, profile: bytes | None) -> tuple[Image.Image, bool]:
    """The image in sRGB, and whether its profile had to be ignored.

    Phones use Display P3 and cameras Adobe RGB: read as sRGB, their colors look washed out.
    """
    if not profile:
        return image.convert("RGB"), False
    try:
        source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        if "sRGB" in ImageCms.getProfileDescription(source):  # no conversion, no rounding
            return image.convert("RGB"), False
        converted = ImageCms.profileToProfile(
            image,
            source,
            ImageCms.createProfile("sRGB"),
            renderingIntent=ImageCms.Intent.RELATIVE_COLORIMETRIC,
            outputMode="RGB",
        )
    except Exception:  # a profile of another color space, truncated, or malformed
        return image.convert("RGB"), True
    assert converted is not None  # None only for in-place conversion
    return converted, False
