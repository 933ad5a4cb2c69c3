"""Decodes images: every mode, EXIF orientation and color profile is converted to upright sRGB."""

import io
import re
import warnings
from contextlib import suppress

import numpy as np
from PIL import Image, ImageCms, ImageOps, UnidentifiedImageError

from inference import heif, image_limits
from inference.color_profiles import named_in_avif, named_in_png, profile_for
from inference.image_limits import ImageLimit

# What files are by their first bytes: Pillow's names of the formats that are read. Only the parser
# of that format sees a file; Pillow alone would try all it has, and some of those run programs.
_FORMATS = (
    ("JPEG", re.compile(rb"\xff\xd8\xff")),
    ("PNG", re.compile(rb"\x89PNG\r\n\x1a\n")),
    ("WEBP", re.compile(rb"RIFF....WEBP", re.DOTALL)),
    ("GIF", re.compile(rb"GIF8[79]a")),
    ("BMP", re.compile(rb"BM.{12}[\x0c\x28\x34\x38\x40\x6c\x7c]\0\0\0", re.DOTALL)),
    ("TIFF", re.compile(rb"II\*\0|MM\0\*")),
    ("JPEG2000", re.compile(rb"\xff\x4f\xff\x51|\0\0\0\x0cjP  \r\n\x87\n")),
    ("AVIF", re.compile(rb"....ftyp(avif|avis|(mif1|msf1).{4}(....)*(avif|avis))", re.DOTALL)),
    ("HEIF", re.compile(rb"....ftyp(hei[cxms]|hev[cxms]|mif1|msf1)", re.DOTALL)),
)
HEAD_BYTES = 64  # enough to recognize a format
READABLE = "JPEG, PNG, WebP, HEIC, AVIF, TIFF, BMP, GIF or JPEG 2000"


def format_of(head: bytes) -> str | None:
    """The format of a file with these first bytes; None if it is no image that is read."""
    for name, signature in _FORMATS:
        if signature.match(head[:HEAD_BYTES]):
            return name
    return None


def open_image(data: bytes) -> Image.Image:
    """Opens an image file without decoding its pixels.

    Raises `UnidentifiedImageError` for anything but the formats of `READABLE`, `ImageLimit` for
    files that could cost much more than their pixels, and whatever Pillow raises on malformed
    images: catch `Exception`. The number of pixels is not limited here.
    """
    known = format_of(data)
    if known is None:
        raise UnidentifiedImageError(f"not {READABLE}")
    image_limits.check(known, data)
    image = Image.open(io.BytesIO(data), formats=(known,))
    if known == "BMP":
        image_limits.check_bmp(image)
    # Only profiles are converted from; files can also name a color space by numbers.
    named = None
    if known == "PNG":
        named = named_in_png(data)  # it precedes a profile
    elif "icc_profile" not in image.info:
        named = image.info.get(heif.COLOR) if known == "HEIF" else None
        named = named_in_avif(data) if known == "AVIF" else named
    profile = profile_for(*named) if named is not None else None
    if profile is not None:
        image.info["icc_profile"] = profile
    return image


class BrokenImage(ValueError):
    """A file that is not an image, or a damaged image."""


def decoded(data: bytes, name: str, background: str | None = "white") -> Image.Image:
    """Decodes an input image for generation: upright, sRGB, transparency over the background or
    kept (None).

    `name` is its name in messages. Raises `BrokenImage` with the reason.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with open_image(data) as opened:
                if opened.width * opened.height > (Image.MAX_IMAGE_PIXELS or 0):
                    raise Image.DecompressionBombError
                return upright_srgb(opened, background)[0]
    except UnidentifiedImageError as error:
        raise BrokenImage(f"image {name} is not a {READABLE} image; convert it") from error
    except ImageLimit as error:
        raise BrokenImage(f"image {name} {error}") from error
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        most = Image.MAX_IMAGE_PIXELS or 0
        raise BrokenImage(f"image {name} has more than {most:,} pixels; shrink it") from error
    except Exception as error:  # Pillow may raise any exception on malformed images
        raise BrokenImage(f"image {name} is damaged ({error}); export it again") from error


def is_animation(image: Image.Image) -> bool:
    """Whether an opened image has several frames or pages, of which the first is used."""
    # MPO is a photo with a depth map or a second view.
    return bool(getattr(image, "is_animated", False)) and image.format != "MPO"


def upright_size(image: Image.Image) -> tuple[int, int]:
    """Width and height of an opened image when it is upright, from its header."""
    turned = 1
    if image.format not in ("TIFF", "HEIF"):  # whose size is that of the upright image
        with suppress(Exception):  # broken EXIF: the pixels may still be valid
            turned = image.getexif().get(0x0112, 1)
    return image.size[::-1] if turned in (5, 6, 7, 8) else image.size


def _turn_upright(image: Image.Image) -> None:
    """Decodes an image and turns it upright, in place, so that no copy is made."""
    image.load()
    if image.format != "HEIF":  # turned by its own property; EXIF's does not count then
        with suppress(Exception):  # broken EXIF: the pixels are still valid
            ImageOps.exif_transpose(image, in_place=True)


def upright_alpha(image: Image.Image) -> Image.Image | None:
    """The opacity of an image, in mode L and upright; None if it has no transparency.

    `image` itself is turned upright. Raises as `upright_srgb` does.
    """
    _turn_upright(image)
    if not image.has_transparency_data or image.mode.startswith("I"):
        return None
    return image.convert("RGBA").getchannel("A")


def upright_srgb(image: Image.Image, background: str | None = "white") -> tuple[Image.Image, bool]:
    """Converts an image to upright 8-bit sRGB; also returns whether its color profile was invalid.

    Transparency is composed over the background; None keeps it, in mode RGBA. Of an animation, the
    first frame is used. `image` itself is turned upright. Pillow may raise any exception on
    malformed images: catch `Exception`.
    """
    _turn_upright(image)
    profile = image.info.get("icc_profile")

    if image.mode == "F" or (image.mode == "I" and image.format == "TIFF"):
        raise ImageLimit("has pixels of 32 bits; export it with 8 or 16 bits per channel")
    if image.mode == "LAB":
        raise ImageLimit("has Lab colors; export it as RGB")
    if image.mode.startswith("I"):  # 16-bit grayscale, which convert("RGB") would clip
        pixels_HW = np.asarray(image).astype(np.float32) / 257
        image = Image.fromarray(pixels_HW.round().clip(0, 255).astype(np.uint8))
    alpha = image.convert("RGBA").getchannel("A") if image.has_transparency_data else None
    if image.mode != "CMYK":
        image = _in_mode(image, "L" if image.mode in ("1", "L", "LA") else "RGB")
    image, bad_profile = _srgb(image, profile)
    if alpha is not None and background is None:
        return Image.merge("RGBA", (*image.split(), alpha)), bad_profile
    return image if alpha is None else over(image, alpha, str(background)), bad_profile


def over(image: Image.Image, alpha: Image.Image, background: str = "white") -> Image.Image:
    """The RGB image over a color; `alpha` is 255 where it is opaque."""
    whole = Image.new("RGB", image.size, background)
    whole.paste(image, mask=alpha)
    return whole


def _srgb(image: Image.Image, profile: bytes | None) -> tuple[Image.Image, bool]:
    """The image in sRGB, and whether its profile had to be ignored.

    Phones use Display P3 and cameras Adobe RGB: read as sRGB, their colors look washed out.
    """
    if not profile:
        return _in_mode(image, "RGB"), False
    try:
        source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        if "sRGB" in ImageCms.getProfileDescription(source):  # no conversion, no rounding
            return _in_mode(image, "RGB"), False
        converted = ImageCms.profileToProfile(
            image,
            source,
            ImageCms.createProfile("sRGB"),
            renderingIntent=ImageCms.Intent.RELATIVE_COLORIMETRIC,
            outputMode="RGB",
        )
    except Exception:  # a profile of another color space, truncated, or malformed
        return _in_mode(image, "RGB"), True
    assert converted is not None  # None only for in-place conversion
    return converted, False


def _in_mode(image: Image.Image, mode: str) -> Image.Image:
    """The image in this mode; itself, without a copy, if it has it."""
    return image if image.mode == mode else image.convert(mode)
