"""Reads image files to pixels, and writes pixels to image files."""

import errno
import io
import os
import re
import shutil
import stat
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from os import PathLike
from pathlib import Path

import numpy
import torch
from PIL import Image, ImageOps
from torch import Tensor

from adapters.files.atomic import atomic_file, temporary_space
from adapters.files.containers import printable
from families.redact import safe_name
from inference import image_metadata
from inference.image_decoding import BrokenImage, decoded, over
from inference.inputs import FORMATS, QUALITY
from inference.request import BLACK_MASK, REFERENCES

MAX_BYTES = 256 << 20  # as in a dataset
_NUMBER = re.compile("[0-9]{1,18}")
_PREFIX = "zeroprior-images-"
_KEPT_SECONDS = 3600  # Cog never deletes the files that it has sent


def read_image(path: str | PathLike[str], name: str = "image") -> Image.Image:
    """Reads an image of the input `name`: upright, sRGB, transparency over white; that of reference
    images is kept, since a model may use it.

    Raises `BrokenImage` with the reason.
    """
    try:
        data = _bytes_of(Path(path))
    except FileNotFoundError as error:
        raise BrokenImage(f"image {printable(safe_name(str(path))[:200])}: no such file") from error
    except OSError as error:
        file = printable(Path(path).name)
        raise BrokenImage(f"image {file} cannot be read ({error.strerror or error})") from error
    return decoded(data, printable(Path(path).name), None if name == REFERENCES else "white")


def _bytes_of(path: Path) -> bytes:
    """The content of a regular file of limited size; a device could be endless."""
    if not path.is_file():
        raise FileNotFoundError
    with path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size  # `read` reserves memory for what it is asked for
        if size > MAX_BYTES:
            raise BrokenImage(
                f"image {printable(path.name)} has more than {MAX_BYTES:,} bytes; shrink it"
            )
        return file.read(size)


def to_pixels(image: Image.Image, width: int, height: int) -> Tensor:
    """Pixels 13PP in [-1, 1] of the image, scaled and center-cropped to this size."""
    fitted = ImageOps.fit(image, (width, height), method=Image.Resampling.LANCZOS)
    levels = torch.from_numpy(numpy.array(fitted)).permute(2, 0, 1)
    return (levels.float() / 127.5 - 1).unsqueeze(0)


def to_mask(mask: Image.Image, width: int, height: int) -> Tensor:
    """11PP: 1 where the mask is white (lighter than half), else 0; scaled and cropped like images.

    Raises ValueError for a mask that is black everywhere.
    """
    white = to_pixels(mask.convert("RGB"), width, height).mean(dim=1, keepdim=True) > 0
    if not white.any():
        raise ValueError(BLACK_MASK)
    return white.float()


def to_images(pixels_BCPP: Tensor) -> list[Image.Image]:
    """8-bit images of pixels in [-1, 1], with the rounding of diffusers' pipelines.

    Three channels are RGB; four are RGB and alpha, where 1 is opaque.
    """
    levels = ((pixels_BCPP / 2 + 0.5).clamp(0, 1) * 255).round().to("cpu", torch.uint8)
    return [Image.fromarray(each.numpy()) for each in levels.permute(0, 2, 3, 1)]


def save_images(
    images: Sequence[Image.Image],
    folder: Path,
    file_format: str = FORMATS[0],
    quality: int = QUALITY,
    metadata: bool = True,
) -> list[Path]:
    """Writes `image-0.webp`, … into the folder, numbered after existing files.

    No file is overwritten, also not one of a concurrent process. `file_format` is webp, jpg or png;
    `quality`, from 1 to 100, is for the first two. Only png keeps an image's alpha channel; in the
    others, the image is over white. With `metadata`, prompt and settings are written into the files
    (`inference.image_metadata`).
    """
    folder.mkdir(parents=True, exist_ok=True)
    paths: list[Path] = []
    for image in images:
        path = _new_file(folder, file_format)
        try:
            write_image(image, path, file_format, quality, metadata)
        except BaseException:
            path.unlink(missing_ok=True)
            raise
        paths.append(path)
    return paths


def write_image(
    image: Image.Image, path: Path, file_format: str, quality: int, metadata: bool
) -> None:
    """Writes the image to the path, atomically; arguments as in `save_images`."""
    options = {} if file_format == "png" else {"quality": quality}
    if metadata:
        texts = {
            key: image.info[key]
            for key in (image_metadata.TEXT, image_metadata.JSON)
            if key in image.info
        }
        options |= image_metadata.options(texts, file_format)
    if image.mode == "RGBA" and file_format != "png":
        image = over(image.convert("RGB"), image.getchannel("A"))
    # Into memory first: on a full disk Pillow only reports "encoder error".
    content = io.BytesIO()
    image.save(content, format="jpeg" if file_format == "jpg" else file_format, **options)
    with atomic_file(path) as file:
        file.write(content.getvalue())


def _new_file(folder: Path, file_format: str) -> Path:
    """Creates an empty `image-N`; N is higher than every number in the folder."""
    stems = [old.stem.removeprefix("image-") for old in folder.glob("image-*.*")]
    number = max((int(stem) for stem in stems if _NUMBER.fullmatch(stem)), default=-1) + 1
    while True:
        path = folder / f"image-{number}.{file_format}"
        try:
            path.open("xb").close()
        except FileExistsError:  # created by another process meanwhile
            number += 1
            continue
        return path


def writable_folder(path: str | PathLike[str]) -> Path:
    """Creates the folder for a request's images, before anything is generated.

    Raises OSError if it is not writable.
    """
    folder = Path(path).expanduser()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if not os.access(folder, os.W_OK | os.X_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
    except OSError as error:
        raise OSError(
            f"images cannot be written to {printable(str(folder)[:200])} "
            f"({error.strerror or error}); choose another output_dir"
        ) from error
    return folder


@contextmanager
def fresh_folder() -> Iterator[Path]:
    """A new temporary folder for one request's images, removed on an error in the context.

    At the end, this user's folders of more than an hour ago are removed. Raises OSError naming the
    temporary folder if the disk is full.
    """
    with temporary_space("the images"):
        folder = Path(tempfile.mkdtemp(prefix=_PREFIX))
        try:
            yield folder
        except BaseException:
            shutil.rmtree(folder, ignore_errors=True)
            raise
    _remove_old(folder.parent)


def _remove_old(parent: Path) -> None:
    """Ignores errors: other users may share the folder, and other processes clean it too."""
    latest = time.time() - _KEPT_SECONDS
    try:
        folders = [each for each in os.scandir(parent) if each.name.startswith(_PREFIX)]
    except OSError:
        return
    for each in folders:
        try:
            status = each.stat(follow_symlinks=False)
            ours = stat.S_ISDIR(status.st_mode) and status.st_uid == os.getuid()
            if ours and status.st_mtime < latest:
                for file in Path(each.path).glob("image-*"):
                    file.unlink(missing_ok=True)
                os.rmdir(each.path)  # fails if it contains other files
        except OSError:
            continue
