"""Large images are decoded and encoded in tiles; the result is that of one pass."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from families import tiles
from families.loading import load_family
from families.registry import find_base
from families.without_weights import family_without_weights
from trainer.memory.step_cost import Shape, decode_load, image_load

NAMES = ("z-image", "qwen-image")
SIZES = [(168, 232), (256, 256), (96, 328)]  # rows and columns of pixels
LEVEL = 2 / 255  # of pixels in [-1, 1]


@pytest.fixture
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiles so small that a small image has many."""
    monkeypatch.setattr(tiles, "TILE_CELLS", 16)


def whole_and_tiled(monkeypatch: pytest.MonkeyPatch, work: Any) -> tuple[Tensor, Tensor]:
    results = []
    for pixels in (1 << 30, 0):
        for family in ("z_image", "qwen_image"):
            monkeypatch.setattr(f"families.models.{family}.WHOLE_PIXELS", pixels)
        results.append(work())
    return results[0], results[1]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("size", SIZES, ids=str)
@torch.no_grad()
def test_an_image_decoded_in_tiles_is_the_one_decoded_whole(
    name: str,
    size: tuple[int, int],
    use_vault: Path,
    small_tiles: None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    family = load_family(find_base(name), torch.device("cpu"), torch.float32)
    rows, columns = family.latent_size(size[1], size[0])
    random = torch.Generator().manual_seed(3)
    latents = torch.randn(2, family.latent_channels, rows, columns, generator=random)
    whole, tiled = whole_and_tiled(monkeypatch, lambda: family.decode(latents))
    assert tiled.shape == whole.shape
    assert whole.std() > 10 * LEVEL
    assert (whole - tiled).abs().max() < LEVEL / 50


@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_an_image_encoded_in_tiles_is_the_one_encoded_whole(
    name: str, use_vault: Path, small_tiles: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    family = load_family(find_base(name), torch.device("cpu"), torch.float32)
    pixels = torch.rand(1, 3, 168, 232, generator=torch.Generator().manual_seed(3)) * 2 - 1
    whole, tiled = whole_and_tiled(monkeypatch, lambda: torch.stack(family.encode_images(pixels)))
    assert (whole - tiled).abs().max() < 1e-4 * whole.abs().max()


@torch.no_grad()
def test_tiles_that_are_blended_would_show(use_vault: Path) -> None:
    """Why we don't use diffusers' own tiling, which takes each tile's statistics."""
    family = load_family(find_base("z-image"), torch.device("cpu"), torch.float32)
    latents = torch.randn(1, 16, 40, 40, generator=torch.Generator().manual_seed(3))
    whole = family.decode(latents)
    family.vae.enable_tiling()
    family.vae.tile_latent_min_size, family.vae.tile_sample_min_size = 32, 256
    assert (whole - family.decode(latents)).abs().max() > LEVEL


@torch.no_grad()
def test_the_norms_are_the_vaes_own_again_afterwards(
    use_vault: Path, small_tiles: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    family = load_family(find_base("z-image"), torch.device("cpu"), torch.float32)
    latents = torch.randn(1, 16, 24, 24, generator=torch.Generator().manual_seed(3))
    before = family.decode(latents)
    whole_and_tiled(monkeypatch, lambda: family.decode(latents))
    monkeypatch.undo()
    assert torch.equal(family.decode(latents), before)


@pytest.mark.parametrize("name", NAMES)
def test_the_largest_image_takes_no_more_than_a_usual_one(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bytes at the published sizes; one pass over 2048 x 2048 pixels takes 12.9 and 29 GB."""
    monkeypatch.delenv("MODEL_VAULT", raising=False)
    family = family_without_weights(find_base(name))
    assert decode_load(family, Shape(1, 1, 1328, 1328, 1)).bytes < 1.2e9
    assert decode_load(family, Shape(1, 1, 2048, 2048, 1)).bytes < 2.8e9
    assert image_load(family, Shape(1, 1, 2048, 2048, 1)).bytes < 4.3e9
