"""ICC profiles for color spaces that a file names by numbers, without a profile of its own.

The numbers are those of ITU-T H.273, in PNG's cICP chunk and in the nclx box of HEIC and AVIF.
"""

import struct
from collections.abc import Callable
from functools import cache

import numpy as np

from inference.heif import read_items
from inference.image_limits import ImageLimit

Curve = Callable[[np.ndarray], np.ndarray]

_D65, _D50 = (0.3127, 0.3290), (0.3457, 0.3585)
# Red, green, blue and white, as x and y (H.273, table 2). sRGB has those of 1; 2 is unspecified.
_SRGB = ((0.64, 0.33), (0.30, 0.60), (0.15, 0.06), _D65)
_SMPTE_C = ((0.63, 0.34), (0.31, 0.595), (0.155, 0.07), _D65)
_PRIMARIES = {
    5: ((0.64, 0.33), (0.29, 0.60), (0.15, 0.06), _D65),  # PAL
    6: _SMPTE_C,
    7: _SMPTE_C,
    9: ((0.708, 0.292), (0.170, 0.797), (0.131, 0.046), _D65),  # BT.2020
    11: ((0.68, 0.32), (0.265, 0.69), (0.15, 0.06), (0.314, 0.351)),  # DCI-P3
    12: ((0.68, 0.32), (0.265, 0.69), (0.15, 0.06), _D65),  # Display P3
    22: ((0.63, 0.34), (0.295, 0.605), (0.155, 0.077), _D65),  # EBU 3213
}
_BRADFORD = np.array(
    ((0.8951, 0.2664, -0.1614), (-0.7502, 1.7135, 0.0367), (0.0389, -0.0685, 1.0296))
)


def _srgb(value: np.ndarray) -> np.ndarray:
    return np.where(value <= 0.04045, value / 12.92, ((value + 0.055) / 1.055) ** 2.4)


def _pq(value: np.ndarray) -> np.ndarray:
    """SMPTE ST 2084, with paper white (203 cd/m², ITU-R BT.2408) as 1; brighter is clipped."""
    root = value ** (1 / 78.84375)
    light = np.maximum(root - 0.8359375, 0) / (18.8515625 - 18.6875 * root)
    return 10_000 / 203 * light ** (1 / 0.1593017578125)


def _hlg(value: np.ndarray) -> np.ndarray:
    """ITU-R BT.2100's hybrid log-gamma at 1000 cd/m², with the signal 0.75 as paper white."""

    def scene(signal: np.ndarray) -> np.ndarray:
        high = (np.exp((signal - 0.55991073) / 0.17883277) + 0.28466892) / 12
        return np.asarray(np.where(signal <= 0.5, signal**2 / 3, high) ** 1.2)

    return scene(value) / scene(np.array(0.75))


# By the number of the transfer function (H.273, table 3). That of television, 1, 6, 14 and 15, is
# read as sRGB's, as browsers do: it is written for images that are meant to be sRGB.
_CURVES: dict[int, Curve] = {
    4: lambda value: value**2.2,
    5: lambda value: value**2.8,
    8: lambda value: value,
    16: _pq,
    18: _hlg,
}


@cache
def profile_for(primaries: int, transfer: int) -> bytes | None:
    """An ICC profile of a color space; None if it is sRGB or unknown."""
    if primaries not in _PRIMARIES and transfer not in _CURVES:
        return None
    if primaries not in (1, 2) and primaries not in _PRIMARIES:
        return None
    colors_33 = _to_d50(_PRIMARIES.get(primaries, _SRGB))
    curve = _CURVES.get(transfer, _srgb)(np.linspace(0, 1, 4096)).clip(0, 1)
    return _icc(colors_33, np.round(curve * 65535).astype(">u2").tobytes())


def named_in_png(data: bytes) -> tuple[int, int] | None:
    """Primaries and transfer in the cICP chunk of a PNG, or None."""
    place = 8
    for _ in range(100):  # it comes before the pixels, usually first
        head = data[place : place + 8]
        if len(head) < 8 or head[4:] == b"IDAT":
            return None
        (length,) = struct.unpack_from(">I", head)
        if head[4:] == b"cICP" and length == 4:
            return tuple(data[place + 8 : place + 10]) if len(data) >= place + 10 else None  # type: ignore[return-value]
        place += 12 + length
    return None


def named_in_avif(data: bytes) -> tuple[int, int] | None:
    """Primaries and transfer of an AVIF's image, or None."""
    try:
        items = read_items(data)
    except ImageLimit:
        return None
    return items.colors.get(items.primary)


def _to_d50(primaries: tuple[tuple[float, float], ...]) -> np.ndarray:
    """XYZ of red, green and blue as columns, under ICC's white D50 (Lindbloom)."""
    red, green, blue, white = (np.array((x / y, 1, (1 - x - y) / y)) for x, y in primaries)
    columns = np.stack([red, green, blue], axis=1)
    columns = columns * np.linalg.solve(columns, white)
    x, y = _D50
    d50 = np.array((x / y, 1, (1 - x - y) / y))
    scale = np.diag((_BRADFORD @ d50) / (_BRADFORD @ white))
    return np.asarray(np.linalg.inv(_BRADFORD) @ scale @ _BRADFORD @ columns)


def _icc(colors_33: np.ndarray, curve: bytes) -> bytes:
    """A display profile of version 2.4 with three colors and one curve (ICC.1:2001-04)."""

    def xyz(values: np.ndarray) -> bytes:
        return b"XYZ " + bytes(4) + np.round(values * 65536).astype(">i4").tobytes()

    name = b"named by numbers"
    described = b"desc" + bytes(4) + struct.pack(">I", len(name) + 1) + name + bytes(79)
    white = np.array((0.9642, 1.0, 0.8249))
    tone = b"curv" + bytes(4) + struct.pack(">I", len(curve) // 2) + curve
    tags = {b"desc": described, b"cprt": b"text" + bytes(8), b"wtpt": xyz(white)}
    tags |= {b"rXYZ": xyz(colors_33[:, 0]), b"gXYZ": xyz(colors_33[:, 1])}
    tags |= {b"bXYZ": xyz(colors_33[:, 2]), b"rTRC": tone, b"gTRC": tone, b"bTRC": tone}
    table, content = struct.pack(">I", len(tags)), b""
    for tag, value in tags.items():
        place = 128 + 4 + 12 * len(tags) + len(content)
        table += tag + struct.pack(">II", place, len(value))
        content += value + bytes(-len(value) % 4)
    size = 128 + len(table) + len(content)
    header = struct.pack(">I4sI4s4s4s", size, b"", 0x02400000, b"mntr", b"RGB ", b"XYZ ")
    header += bytes(12) + b"acsp" + bytes(28) + xyz(white)[8:] + bytes(48)
    return header + table + content
