"""From pixels to picture files."""

import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

_PREFIX = "zeroprior-pictures-"
_KEPT_SECONDS = 3600  # the runtime never deletes what it has sent


def to_images(pixels_B3PP: Tensor) -> list[Image.Image]:
    """8-bit pictures of pixels in [-1, 1], with the stock pipelines' rounding."""
    levels = ((pixels_B3PP / 2 + 0.5).clamp(0, 1) * 255).round().to("cpu", torch.uint8)
    return [Image.fromarray(each.numpy()) for each in levels.permute(0, 2, 3, 1)]


def save_images(
    images: Sequence[Image.Image], folder: Path, file_format: str = "png", quality: int = 90
) -> list[Path]:
    """Writes `image-0.png`, … into the folder, after those that are there already.

    `file_format` is webp, jpg or png; `quality`, from 1 to 100, is of the first two.
    """
    folder.mkdir(parents=True, exist_ok=True)
    stems = [old.stem.removeprefix("image-") for old in folder.glob("image-*.*")]
    taken = [int(stem) for stem in stems if stem.isdigit()]
    paths = []
    for number, image in enumerate(images, start=max(taken, default=-1) + 1):
        path = folder / f"image-{number}.{file_format}"
        options = {} if file_format == "png" else {"quality": quality}
        image.save(path, format="jpeg" if file_format == "jpg" else file_format, **options)
        paths.append(path)
    return paths


def fresh_folder() -> Path:
    """A new temporary folder for one request's pictures; those of an hour ago are removed."""
    now = time.time()
    for old in Path(tempfile.gettempdir()).glob(f"{_PREFIX}*"):
        if now - old.stat().st_mtime > _KEPT_SECONDS:
            for file in old.glob("image-*"):
                file.unlink(missing_ok=True)
            if not any(old.iterdir()):
                old.rmdir()
    return Path(tempfile.mkdtemp(prefix=_PREFIX))
