"""Runs a VAE in tiles with the same result as one pass over the whole image.

After its middle block, a VAE's decoder works on neighborhoods of a few pixels, except for group
norms, which take their mean and variance from the whole image. So the last blocks, which need
nearly all of the memory, run tile by tile. Every tile includes the surrounding pixels that its
output depends on, and group norms get the statistics of the whole image: they are measured in
passes over all tiles, one pass for each norm. Blended tiles, as in diffusers, use the statistics of
each tile and differ visibly (`tests/families/test_tiles.py`).

Shapes: B images, C channels, H and W rows and columns.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch
from diffusers.models.resnet import ResnetBlock2D
from torch import Tensor, nn

from families.device import widest

# A cell is the square of pixels that corresponds to one pixel where tiling begins or ends: 4 x 4
# pixels if two blocks that change the size are tiled.
TILE_CELLS = 128
# The surroundings a pixel depends on. For the decoder, at 4 pixels a cell: an upsampling and three
# residual blocks of two convolutions at 2 pixels, the same at 1 pixel and the last convolution:
# 22 pixels.
HALO_CELLS = 7
SIZE_CHANGES = 2  # up- or downsampling layers in the tiled part


class _Reached(Exception):
    """The norm's input has been measured; the rest of the pass is not needed."""


class _Tile(NamedTuple):
    """Position of a tile, in cells."""

    rows: slice
    columns: slice
    around: tuple[slice, slice]  # the same with its surroundings

    def inside(self, values: Tensor) -> Tensor:
        """The tile's part of `values`, which were computed from `around`."""
        scale = values.shape[-1] // (self.around[1].stop - self.around[1].start)
        own = (self.rows, self.columns)
        cut = [
            slice((a.start - b.start) * scale, (a.stop - b.start) * scale)
            for a, b in zip(own, self.around, strict=True)
        ]
        return values[..., cut[0], cut[1]]


class _WholeNorm:
    """Replaces a group norm's forward: measures the whole image's statistics, then applies them."""

    def __init__(self, norm: nn.GroupNorm) -> None:
        self.norm = norm
        self.tile: _Tile | None = None
        self._sums: tuple[Tensor, Tensor] | None = None  # of values and squares, [B, G]
        self._count = 0
        self.measured: tuple[Tensor, Tensor] | None = None  # mean and 1/deviation

    def forward(self, x_BCHW: Tensor) -> Tensor:
        if self.measured is None:
            self._measure(x_BCHW)
            raise _Reached
        mean_BG, inverse_BG = self.measured
        groups = x_BCHW.unflatten(1, (self.norm.num_groups, -1))
        shape = (*mean_BG.shape, 1, 1, 1)
        normal = (groups - mean_BG.view(shape)).mul_(inverse_BG.view(shape)).flatten(1, 2)
        weight_C11, bias_C11 = (each.view(-1, 1, 1) for each in (self.norm.weight, self.norm.bias))
        return normal.mul_(weight_C11).add_(bias_C11)

    def _measure(self, x_BCHW: Tensor) -> None:
        assert self.tile is not None
        groups = self.tile.inside(x_BCHW).unflatten(1, (self.norm.num_groups, -1)).flatten(2)
        wide = widest(groups.device)
        norms = torch.linalg.vector_norm(groups, dim=-1, dtype=wide)
        sums = groups.sum(-1, dtype=wide), norms.square()
        if self._sums is not None:
            sums = sums[0] + self._sums[0], sums[1] + self._sums[1]
        self._sums, self._count = sums, self._count + groups.shape[-1]

    def finish(self) -> None:
        """Computes mean and deviation after a pass, if the pass reached this norm."""
        if self._sums is None or self.measured is not None:
            return
        mean_BG = self._sums[0] / self._count
        variance_BG = (self._sums[1] / self._count - mean_BG.square()).clamp_min(0)
        self.measured = mean_BG.float(), (variance_BG + self.norm.eps).rsqrt().float()


def split_decoder(
    layers: Sequence[nn.Module], resize: type[nn.Module]
) -> tuple[list[nn.Module], list[nn.Module], int]:
    """A decoder's layers before the tiled ones, the tiled ones, and their upsampling factor."""
    at = [k for k, layer in enumerate(layers) if isinstance(layer, resize)][-SIZE_CHANGES:]
    start = at[0] if at else 0
    return [*layers[:start]], [*layers[start:]], 2 ** len(at)


def split_encoder(
    layers: Sequence[nn.Module], resize: type[nn.Module]
) -> tuple[list[nn.Module], list[nn.Module], int]:
    """An encoder's tiled layers, the others, and the downsampling factor of the tiled ones."""
    at = [k for k, layer in enumerate(layers) if isinstance(layer, resize)][:SIZE_CHANGES]
    stop = at[-1] + 1 if at else 0
    return [*layers[:stop]], [*layers[stop:]], 2 ** len(at)


def group_norms(layers: Sequence[nn.Module]) -> list[nn.GroupNorm]:
    """All group norms in the layers."""
    every = (each for layer in layers for each in layer.modules())
    return [each for each in every if isinstance(each, nn.GroupNorm)]


def through(layers: Sequence[Callable[..., Tensor]], values: Tensor) -> Tensor:
    """Applies the layers one after another."""
    for layer in layers:
        values = layer(values, None) if isinstance(layer, ResnetBlock2D) else layer(values)
    return values


def in_tiles(
    work: Callable[[Tensor], Tensor],
    norms: Sequence[nn.GroupNorm],
    x: Tensor,
    *,
    cell: int,
    scale: float,
    halo: int = HALO_CELLS,
) -> Tensor:
    """`work(x)`, tile by tile; `norms` are the group norms in it.

    `x` has `cell` rows and columns per cell, and the result `scale` times as many. `work` may
    consist of convolutions, resampling by 2, norms over channels and group norms. `halo` is the
    number of surrounding cells that a cell depends on, or more.
    """
    rows, columns = (side // cell for side in x.shape[-2:])
    tiles = list(_tiles(rows, columns, halo))

    def run(tile: _Tile) -> Tensor:
        high, wide = (slice(each.start * cell, each.stop * cell) for each in tile.around)
        return work(x[..., high, wide])

    with _of_the_whole(norms) as measuring:
        for _ in measuring:  # each pass runs up to the next norm
            for tile in tiles:
                for norm in measuring:
                    norm.tile = tile
                try:
                    run(tile)
                except _Reached:
                    continue
            for norm in measuring:
                norm.finish()
        each_way, result = round(cell * scale), None
        for tile in tiles:
            part = tile.inside(run(tile))
            if result is None:
                size = (rows * each_way, columns * each_way)
                result = part.new_empty((*part.shape[:-2], *size))
            place = [slice(x.start * each_way, x.stop * each_way) for x in tile[:2]]
            result[..., place[0], place[1]] = part
    assert result is not None
    return result


def _tiles(rows: int, columns: int, halo: int) -> Iterator[_Tile]:
    for row in _cuts(rows):
        for column in _cuts(columns):
            around = [
                slice(max(0, each.start - halo), min(size, each.stop + halo))
                for each, size in ((row, rows), (column, columns))
            ]
            yield _Tile(row, column, (around[0], around[1]))


def _cuts(size: int) -> list[slice]:
    """Equal parts of at most `TILE_CELLS`."""
    count = -(-size // TILE_CELLS)
    bounds = [size * k // count for k in range(count + 1)]
    return [slice(a, b) for a, b in zip(bounds, bounds[1:], strict=False)]


@contextmanager
def _of_the_whole(norms: Sequence[nn.GroupNorm]) -> Iterator[list[_WholeNorm]]:
    """Within the context, the group norms use the statistics of the whole image."""
    found = [_WholeNorm(each) for each in norms]
    for each in found:
        each.norm.forward = each.forward  # type: ignore[assignment, method-assign]
    try:
        yield found
    finally:
        for each in found:
            del each.norm.forward
