"""Finds images that are nearly the same, and datasets whose images have one background.

A pair is compared in two steps: a 64-bit hash of the lowest frequencies (DCT, each bit whether a
coefficient is above the median), as it is and mirrored, and then the correlation of the
thumbnails. The hash alone calls 1 in 3,000 unrelated pairs alike, which is many among a thousand
images. Limits measured on 20 images with their changed copies, 100 aligned faces, and 2,000
random textures (docs/datasets.md).
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from trainer.data.measures import THUMBNAIL

NEARLY_THE_SAME = 10  # differing bits of 64
ALIKE = 16
CORRELATION = 0.9  # of the thumbnails, at the best shift
SHIFT = 1  # pixels of the thumbnail, a sixteenth of the side
_SHIFTS, _SIDE = 2 * SHIFT + 1, THUMBNAIL - 2 * SHIFT

BORDER = 2  # pixels of the thumbnail around it
SAME_COLOR = 16  # of 255, the largest difference of a channel, in half of the border's pixels
SAME_SHARE = 0.7  # of the images
LEAST_FOR_BACKGROUND = 6  # images

_LOW = 8  # frequencies in each direction
_DCT = np.cos(np.pi * np.outer(np.arange(_LOW), 2 * np.arange(THUMBNAIL) + 1) / (2 * THUMBNAIL))
_LUMA = np.array([0.299, 0.587, 0.114])


class Likeness(NamedTuple):
    """Groups of images by their positions: nearly the same, and alike, which contain the former."""

    nearly_the_same: list[list[int]]
    alike: list[list[int]]


def alike(pixels: NDArray[np.uint8]) -> Likeness:
    """The groups among thumbnails [N, 16, 16, 3]."""
    colors = pixels.astype(np.float32)
    hashes, mirrored = _hashes(colors)
    lengths = _lengths(colors)
    # Images of one color have equal hashes, but resemble nothing.
    known = np.flatnonzero(lengths.any(axis=(1, 2)))
    same, similar = np.arange(len(pixels)), np.arange(len(pixels))  # the group of each
    for place, one in enumerate(known, start=1):
        others = known[place:]
        bits = np.minimum(
            np.bitwise_count(hashes[one] ^ hashes[others]),
            np.bitwise_count(mirrored[one] ^ hashes[others]),
        )
        # Pairs that are in one group already need no comparison.
        new = (similar[others] != similar[one]) & (bits <= ALIKE)
        new |= (same[others] != same[one]) & (bits <= NEARLY_THE_SAME)
        others, bits = others[new], bits[new]
        if not len(others):
            continue
        agree = _correlation(colors[one], colors[others], lengths[others]) >= CORRELATION
        for other in others[agree]:
            similar[similar == similar[other]] = similar[one]
        for other in others[agree & (bits <= NEARLY_THE_SAME)]:
            same[same == same[other]] = same[one]
    return Likeness(_groups(same), _groups(similar))


def same_background(pixels: NDArray[np.uint8]) -> list[int]:
    """The images with the same border, if these are most of the thumbnails; else none.

    Each pixel is compared with the median of all images. Half of them may differ, as where the
    subject touches the border.
    """
    if len(pixels) < LEAST_FOR_BACKGROUND:
        return []
    border = np.ones(pixels.shape[1:3], dtype=bool)
    border[BORDER:-BORDER, BORDER:-BORDER] = False
    colors = pixels[:, border].astype(np.float32)
    differences = np.abs(colors - np.median(colors, axis=0)).max(axis=2)
    near = np.median(differences, axis=1) <= SAME_COLOR
    return [int(each) for each in np.flatnonzero(near)] if near.mean() >= SAME_SHARE else []


def _hashes(colors: NDArray[np.float32]) -> tuple[NDArray[np.uint64], NDArray[np.uint64]]:
    """The hash of each thumbnail, and of its mirror image."""
    low = _DCT @ (colors @ _LUMA) @ _DCT.T
    # Mirroring changes the sign of every second frequency.
    signs = np.where(np.arange(_LOW) % 2, -1, 1)
    return _bits(low), _bits(low * signs)


def _bits(low: NDArray[np.float64]) -> NDArray[np.uint64]:
    flat = low.reshape(len(low), _LOW * _LOW)
    above = flat > np.median(flat[:, 1:], axis=1, keepdims=True)  # without the mean brightness
    packed = np.packbits(above, axis=1)
    return np.ascontiguousarray(packed).view(np.uint64)[:, 0]


def _lengths(colors: NDArray[np.float32]) -> NDArray[np.float32]:
    """The length of each thumbnail without its mean color, at each shift: [N, 3, 3]. Zero for
    images of one color."""
    exact = colors.astype(np.float64)
    squares = _sums(exact**2).sum(axis=3) - (_sums(exact) ** 2).sum(axis=3) / _SIDE**2
    return np.where(squares > 1, np.sqrt(np.maximum(squares, 0)), 0).astype(np.float32)


def _sums(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """The sums over the part of each thumbnail at each shift: [N, 3, 3, 3]."""
    to = np.pad(values.cumsum(axis=1).cumsum(axis=2), ((0, 0), (1, 0), (1, 0), (0, 0)))
    cut = slice(-_SIDE)
    return to[:, _SIDE:, _SIDE:] - to[:, cut, _SIDE:] - to[:, _SIDE:, cut] + to[:, cut, cut]


def _correlation(
    one: NDArray[np.float32], others: NDArray[np.float32], lengths: NDArray[np.float32]
) -> NDArray[np.float32]:
    """The best correlation of a thumbnail with each of the others [N, 16, 16, 3], which may be
    mirrored and shifted by a pixel. lengths: of the others."""
    mine = one[SHIFT:-SHIFT, SHIFT:-SHIFT]
    mine = mine - mine.mean(axis=(0, 1))
    mine /= max(float(np.linalg.norm(mine)), 1)
    # Its mean color is zero, so that of the others does not matter: all are products with `mine`
    # at its 18 places in a thumbnail.
    places = np.zeros((2, _SHIFTS, _SHIFTS, *one.shape), dtype=np.float32)
    for down in range(_SHIFTS):
        for right in range(_SHIFTS):
            places[0, down, right, down : down + _SIDE, right : right + _SIDE] = mine
    places[1] = places[0, :, :, :, ::-1]
    products = others.reshape(len(others), -1) @ places.reshape(-1, one.size).T
    both = np.stack((lengths, lengths[:, :, ::-1]), axis=1).reshape(products.shape)
    return np.divide(products, both, out=np.zeros_like(products), where=both > 0).max(axis=1)


def _groups(labels: NDArray[np.int64]) -> list[list[int]]:
    """Positions of equal labels, of those that several have, in order."""
    found: dict[int, list[int]] = {}
    for position, label in enumerate(labels.tolist()):
        found.setdefault(label, []).append(position)
    return sorted(group for group in found.values() if len(group) > 1)


def stacked(thumbnails: Sequence[NDArray[np.uint8]]) -> NDArray[np.uint8]:
    """Thumbnails as one array [N, 16, 16, 3], also without any."""
    empty = np.zeros((0, THUMBNAIL, THUMBNAIL, 3), dtype=np.uint8)
    return np.stack(thumbnails) if thumbnails else empty
