"""Decodes pictures: every mode, orientation and colour profile becomes upright sRGB."""

import io

import numpy as np
from PIL import Image, ImageCms

# Pillow would try all that it knows, and some of those run other programs.
IMAGE_FORMATS = ("JPEG", "PNG", "WEBP")
MAX_JPEG_SCANS = 200  # progressive files have about ten; each costs a pass over all pixels

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


def has_too_many_scans(data: bytes) -> bool:
    """Whether it is a JPEG that would take minutes: a small file can ask for millions of passes."""
    # Within JPEG's compressed data 0xFF is followed by 0, so this finds markers alone.
    return data.startswith(b"\xff\xd8") and data.count(b"\xff\xda") > MAX_JPEG_SCANS


def upright_srgb(image: Image.Image) -> tuple[Image.Image, bool]:
    """The picture as people see it, and whether its colour profile is broken and was ignored.

    Upright, colours in sRGB with 8 bits, what is transparent over white; of an animation the first
    frame. Raises whatever Pillow trips over in hostile pixels: catch `Exception`.
    """
    image.load()
    try:
        orientation = image.getexif().get(EXIF_ORIENTATION)
    except Exception:  # broken EXIF does no harm to the pixels
        orientation = None
    profile = image.info.get("icc_profile")

    if image.mode.startswith("I"):  # 16-bit greyscale, which convert("RGB") would clip
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
    if orientation in UPRIGHT:
        image = image.transpose(UPRIGHT[orientation])
    return image, bad_profile


def _srgb(image: Image.Image, profile: bytes | None) -> tuple[Image.Image, bool]:
    """The picture in sRGB, and whether its profile had to be ignored.

    Phones write Display P3 and cameras Adobe RGB: read as sRGB, such colours look washed out.
    """
    if not profile:
        return image.convert("RGB"), False
    try:
        source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        if "sRGB" in ImageCms.getProfileDescription(source):  # nothing to do, nothing to round
            return image.convert("RGB"), False
        converted = ImageCms.profileToProfile(
            image,
            source,
            ImageCms.createProfile("sRGB"),
            renderingIntent=ImageCms.Intent.RELATIVE_COLORIMETRIC,
            outputMode="RGB",
        )
    except Exception:  # a profile for other colours than the picture's, cut short, or worse
        return image.convert("RGB"), True
    assert converted is not None  # it is only where the picture is changed in place
    return converted, False
