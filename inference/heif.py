"""HEIC and HEIF for Pillow, by libheif and libde265 (pi-heif): the primary image alone.

pi-heif's own plugin reads the metadata of all images in a file, before their number is limited.
Importing this module registers the format. libheif applies the file's rotation and crop.
"""

import struct
from collections.abc import Iterator
from dataclasses import dataclass, field

from PIL import Image, ImageFile

from inference.image_limits import ImageLimit

COLOR = "nclx"  # in Image.info: primaries and transfer, as numbers of ITU-T H.273
MAX_TOTAL_PIXELS = 400_000_000  # decoded for one image: tiles, overlays and transparency
MAX_DEPTH = 4  # of images that are made of others


class HeifImageFile(ImageFile.ImageFile):
    """The primary image of a HEIF file."""

    format, format_description = "HEIF", "HEIF container"

    def _open(self) -> None:
        import _pi_heif  # here, so that programs without images start faster

        assert self.fp is not None
        data = self.fp.read()
        _check_cost(read_items(data))
        try:
            # One thread: datasets decode several images at once.
            found = _pi_heif.load_file(data, 1, True, False, True, True, "", False)
        except (OSError, ValueError, RuntimeError, EOFError) as error:
            raise SyntaxError(str(error)) from None
        images = [each for each in found if each is not None]
        self._image = next(each for each in images if each.primary)
        self._size, self._mode = self._image.size_mode
        self.is_animated = len(images) > 1
        profile = self._image.color_profile or {}
        if profile.get("type") in ("rICC", "prof"):
            self.info["icc_profile"] = profile["data"]
        elif profile.get("type") == "nclx":
            named = profile["data"]
            self.info[COLOR] = named["color_primaries"], named["transfer_characteristics"]
        self.tile = []

    def load(self) -> "Image.core.PixelAccess | None":
        """Decodes the image."""
        if self._image is not None:
            pixels = self._image.data
            if self._image.size_mode[0] != self._size:
                raise OSError("the size differs from its header's")
            self.load_prepare()
            self.frombytes(pixels, "raw", (self.mode, self._image.stride))
            self._image = None
        return super().load()


def _is_heif(head: bytes) -> bool:
    return head[4:8] == b"ftyp" and head[8:11] in (b"hei", b"hev", b"mif", b"msf")


Image.register_open(HeifImageFile.format, HeifImageFile, _is_heif)


# ---- What a file is made of ----------------------------------------------------------------------


@dataclass
class Items:
    """The items of a HEIF or AVIF file."""

    primary: int = 0
    pixels: dict[int, int] = field(default_factory=dict)
    parts: dict[int, list[int]] = field(default_factory=dict)  # tiles, layers, transparency
    colors: dict[int, tuple[int, int]] = field(default_factory=dict)  # primaries and transfer


def read_items(data: bytes) -> Items:
    """Reads the boxes of a file (ISO 14496-12 and 23008-12). Raises `ImageLimit` if damaged."""
    items = Items()
    try:
        for kind, start, end in _boxes(data, 0, len(data)):
            if kind == b"meta":
                _read_meta(data, start + 4, end, items)
                return items
    except (struct.error, IndexError) as error:
        raise ImageLimit("is truncated or damaged; export it again or remove it") from error
    return items


def _boxes(data: bytes, start: int, end: int) -> Iterator[tuple[bytes, int, int]]:
    """Kind, start and end of the content of each box."""
    while start + 8 <= end:
        length, kind = struct.unpack_from(">I4s", data, start)
        header = 8
        if length == 1:
            (length,) = struct.unpack_from(">Q", data, start + 8)
            header = 16
        after = end if length == 0 else start + length
        if length not in (0, 1) and length < header or after > end:
            raise IndexError("a box leaves its parent")
        yield kind, start + header, after
        start = max(after, start + header)


def _read_meta(data: bytes, start: int, end: int, items: Items) -> None:
    properties: list[tuple[bytes, int, int]] = []
    for kind, at, after in _boxes(data, start, end):
        if kind == b"pitm":
            items.primary = _number(data, at + 4, 4 if data[at] else 2)
        elif kind == b"iref":
            _read_references(data, at, after, items)
        elif kind == b"iprp":
            for inner, first, last in _boxes(data, at, after):
                if inner == b"ipco":
                    properties = list(_boxes(data, first, last))
                elif inner == b"ipma":
                    _read_properties(data, first, properties, items)


def _read_references(data: bytes, at: int, end: int, items: Items) -> None:
    """Images that others are made of, and their transparency."""
    size = 4 if data[at] else 2
    for kind, start, _ in _boxes(data, at + 4, end):
        own = _number(data, start, size)
        count = _number(data, start + size, 2)
        others = [_number(data, start + size + 2 + size * k, size) for k in range(count)]
        if kind == b"dimg":
            items.parts.setdefault(own, []).extend(others)
        elif kind == b"auxl":  # from the transparency to its image
            for other in others:
                items.parts.setdefault(other, []).append(own)


def _read_properties(
    data: bytes, at: int, properties: list[tuple[bytes, int, int]], items: Items
) -> None:
    """Size and color space of each item."""
    size, wide = (4 if data[at] else 2), data[at + 3] & 1
    count, at = _number(data, at + 4, 4), at + 8
    for _ in range(count):
        item, links = _number(data, at, size), data[at + size]
        at += size + 1
        for _ in range(links):
            index = _number(data, at, 2) & 0x7FFF if wide else data[at] & 0x7F
            at += 1 + wide
            if not 0 < index <= len(properties):
                continue
            kind, start, _ = properties[index - 1]
            if kind == b"ispe":
                width, height = struct.unpack_from(">II", data, start + 4)
                items.pixels[item] = max(items.pixels.get(item, 0), width * height)
            elif kind == b"colr" and data[start : start + 4] == b"nclx":
                items.colors.setdefault(item, struct.unpack_from(">HH", data, start + 4))


def _number(data: bytes, at: int, size: int) -> int:
    if at + size > len(data):
        raise IndexError("cut off")
    return int.from_bytes(data[at : at + size], "big")


def _check_cost(items: Items) -> None:
    """Limits what is decoded for the primary image: a tile can be used many times."""
    known: dict[int, int] = {}

    def cost(item: int, depth: int) -> int:
        if depth > MAX_DEPTH:
            raise ImageLimit("is made of too many layers; export it again as JPEG")
        if item not in known:
            known[item] = items.pixels.get(item, 0) + sum(
                cost(part, depth + 1) for part in items.parts.get(item, ())
            )
        return known[item]

    if cost(items.primary, 0) > MAX_TOTAL_PIXELS:
        raise ImageLimit("is made of too many or too large tiles; export it again as JPEG")
