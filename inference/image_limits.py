"""Refuses image files that could cost far more memory or time than their pixels, before decoding.

The number of pixels is the caller's to limit. These are the ways around that limit: a JPEG with
thousands of scans, a TIFF of 16 pixels in tiles of 4 billion, a JPEG 2000 of 9 kB in code blocks
whose bookkeeping takes gigabytes, a HEIC that repeats one large tile thousands of times.
"""

import struct
from collections.abc import Iterator

from PIL import Image

MAX_JPEG_SCANS = 200  # progressive files have about ten; each costs a pass over all pixels
MAX_GIF_BYTES = 64 << 20  # its blocks of at least 2 bytes are read one by one
MAX_TIFF_TILE_PIXELS = 4096 * 4096
MAX_TIFF_VALUES = 100_000  # of a tag: strips or tiles
MAX_TIFF_TAGS = 1000
# Without compression, LZW, JPEG, Deflate (two numbers) and PackBits. Others are for faxes and maps.
TIFF_COMPRESSIONS = (1, 5, 7, 8, 32946, 32773)
MAX_JPEG2000_PIXELS = 40_000_000  # it takes about 20 bytes of memory per pixel
MAX_JPEG2000_TILES = 4096
MAX_JPEG2000_LAYERS = 64
MIN_JPEG2000_BLOCK = 10  # binary logarithm of the pixels of a code block: 32x32
MAX_JPEG2000_MARKERS = 100_000


class ImageLimit(ValueError):
    """An image that is not decoded. The message says why, and what to do."""


def check(known: str, data: bytes) -> None:
    """Checks a file of the format `known`. Raises `ImageLimit`."""
    if known == "JPEG":
        # In JPEG's compressed data 0xFF is followed by 0, so this counts only markers.
        if data.count(b"\xff\xda") > MAX_JPEG_SCANS:
            raise ImageLimit(f"has more than {MAX_JPEG_SCANS} scans; export it again or remove it")
    elif known == "GIF":
        if len(data) > MAX_GIF_BYTES:
            raise ImageLimit(f"is a GIF of more than {MAX_GIF_BYTES:,} bytes; save it as PNG")
    elif known in ("TIFF", "JPEG2000"):
        try:
            (_check_tiff if known == "TIFF" else _check_jpeg2000)(data)
        except (struct.error, IndexError) as error:
            raise ImageLimit("is truncated or damaged; export it again or remove it") from error


def check_bmp(image: Image.Image) -> None:
    """Refuses BMP with run-length encoding: Pillow decodes it in Python, minutes for a photo."""
    if image.info.get("compression") not in (None, 0, 3):
        raise ImageLimit("is a compressed BMP, which is not supported; save it as PNG")


# ---- TIFF ----------------------------------------------------------------------------------------

_BITS, _COMPRESSION, _SAMPLES, _TILE_WIDTH, _TILE_LENGTH = 258, 259, 277, 322, 323
_SHORT, _LONG = 3, 4
_BYTES = (1, 2, 6, 7)  # types of tags whose values are not numbers in Pillow


def _check_tiff(data: bytes) -> None:
    """The first page's tags (TIFF 6.0, section 2)."""
    order = "<" if data.startswith(b"II") else ">"
    (start,) = struct.unpack_from(f"{order}I", data, 4)
    (count,) = struct.unpack_from(f"{order}H", data, start)
    if count > MAX_TIFF_TAGS:
        raise ImageLimit("is a TIFF with too many tags; save it as PNG")
    numbers = {}
    for place in range(start + 2, start + 2 + 12 * count, 12):
        tag, kind, values = struct.unpack_from(f"{order}HHI", data, place)
        if kind not in _BYTES and values > MAX_TIFF_VALUES:
            raise ImageLimit("is a TIFF in too many strips or tiles; save it as PNG")
        if kind in (_SHORT, _LONG) and values == 1:
            (numbers[tag],) = struct.unpack_from(
                f"{order}{'H' if kind == _SHORT else 'I'}", data, place + 8
            )
    if numbers.get(_COMPRESSION, 1) not in TIFF_COMPRESSIONS:
        raise ImageLimit(
            f"is a TIFF with compression {numbers[_COMPRESSION]}, which is not supported; save it "
            "with LZW or as PNG"
        )
    if numbers.get(_TILE_WIDTH, 0) * numbers.get(_TILE_LENGTH, 0) > MAX_TIFF_TILE_PIXELS:
        raise ImageLimit("is a TIFF in tiles of more than 4096x4096 pixels; save it as PNG")


# ---- JPEG 2000 -----------------------------------------------------------------------------------

_SIZ, _COD, _COC, _SOT, _SOD, _EOC = 0xFF51, 0xFF52, 0xFF53, 0xFF90, 0xFF93, 0xFFD9


def _check_jpeg2000(data: bytes) -> None:
    """The size, and the coding style of the image and of each tile (ISO 15444-1, annex A)."""
    for marker, place in _markers(data, _codestream(data)):
        if marker == _SIZ:
            width, height, left, top, tile_width, tile_height, tile_left, tile_top, parts = (
                struct.unpack_from(">8IH", data, place + 4)
            )
            width, height = width - left, height - top
            if width * height > MAX_JPEG2000_PIXELS:
                raise ImageLimit(
                    f"is a JPEG 2000 with more than {MAX_JPEG2000_PIXELS:,} pixels; save it as PNG"
                )
            across = (width + left - tile_left) // max(1, tile_width) + 1
            tiles = across * ((height + top - tile_top) // max(1, tile_height) + 1)
            if tiles > MAX_JPEG2000_TILES or parts > 4:
                raise ImageLimit("is a JPEG 2000 in too many tiles or channels; save it as PNG")
        elif marker in (_COD, _COC):
            own = marker == _COC
            style = data[place + (3 if own else 2)]
            if not own and struct.unpack_from(">H", data, place + 4)[0] > MAX_JPEG2000_LAYERS:
                raise ImageLimit("is a JPEG 2000 with too many layers; save it as PNG")
            levels, wide, high = struct.unpack_from("3B", data, place + (4 if own else 7))
            (length,) = struct.unpack_from(">H", data, place)
            precincts = data[place + (9 if own else 12) : place + length] if style & 1 else b""
            small = any((each & 15) + (each >> 4) < MIN_JPEG2000_BLOCK for each in precincts[1:])
            if (wide & 15) + (high & 15) + 4 < MIN_JPEG2000_BLOCK or small or levels > 32:
                raise ImageLimit("is a JPEG 2000 in code blocks below 32x32; save it as PNG")


def _codestream(data: bytes) -> int:
    """The place of the first codestream: the file itself, or a box of it."""
    place = 0
    while data[place : place + 2] != b"\xff\x4f":
        length, kind = struct.unpack_from(">I4s", data, place)
        header = 8
        if length == 1:
            (length,) = struct.unpack_from(">Q", data, place + 8)
            header = 16
        if kind == b"jp2c":
            return place + header
        if length < header:  # 0: up to the end
            raise ImageLimit("is truncated or damaged; export it again or remove it")
        place += length
    return place


def _markers(data: bytes, place: int) -> Iterator[tuple[int, int]]:
    """Markers of the main header and of all tiles' headers, and the places of their lengths."""
    place += 2
    part = 0  # where the tile's part begins
    for _ in range(MAX_JPEG2000_MARKERS):
        if place + 2 > len(data):
            return  # cut off: the decoder says so
        (marker,) = struct.unpack_from(">H", data, place)
        if marker == _EOC:
            return
        if marker == _SOD:  # its data follow, up to the end of the part
            (length,) = struct.unpack_from(">I", data, part + 6)
            if length == 0:
                return  # the last one
            if part + length <= place:
                raise ImageLimit("is truncated or damaged; export it again or remove it")
            place = part + length
            continue
        if marker == _SOT:
            part = place
        yield marker, place + 2
        (length,) = struct.unpack_from(">H", data, place + 2)
        place += 2 + max(2, length)
    raise ImageLimit("is a JPEG 2000 in too many parts; save it as PNG")
