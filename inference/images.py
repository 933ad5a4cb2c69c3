"""From picture files to pixels, and from pixels to picture files."""

import errno
import io
import os
import re
import shutil
import stat
import tempfile
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from os import PathLike
from pathlib import Path

import numpy
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from adapters.files.atomic import atomic_file, temporary_space
from adapters.files.containers import printable
from families.redact import safe_name
from inference import image_metadata
from inference.image_decoding import IMAGE_FORMATS, has_too_many_scans, upright_srgb
from inference.inputs import FORMATS, QUALITY

MAX_BYTES = 256 << 20  # as in a dataset
_NUMBER = re.compile("[0-9]{1,18}")
_PREFIX = "zeroprior-pictures-"
_KEPT_SECONDS = 3600  # the runtime never deletes what it has sent


class BrokenImage(ValueError):
    """A file that is no picture, or a damaged one."""


def read_image(path: str | PathLike[str]) -> Image.Image:
    """The picture as it is meant to be seen: upright, sRGB, what is transparent on white.

    Raises `BrokenImage` with the reason.
    """
    name = printable(Path(path).name)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            data = _bytes_of(Path(path))
            if has_too_many_scans(data):
                raise ValueError("it has more scans than a picture needs")
            with Image.open(io.BytesIO(data), formats=IMAGE_FORMATS) as opened:
                return upright_srgb(opened)[0]
    except FileNotFoundError as error:
        raise BrokenImage(f"image {printable(safe_name(str(path))[:200])}: no such file") from error
    except BrokenImage:
        raise
    except UnidentifiedImageError as error:
        raise BrokenImage(f"image {name} is no picture that is read: JPEG, PNG, WebP") from error
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        most = Image.MAX_IMAGE_PIXELS or 0
        raise BrokenImage(f"image {name} has more than {most:,} pixels; shrink it") from error
    except Exception as error:  # hostile pixels make Pillow raise whatever it trips over
        raise BrokenImage(f"image {name} is damaged ({error}); export it again") from error


def _bytes_of(path: Path) -> bytes:
    """The content of an ordinary file that is not too large; a device may have no end."""
    if not path.is_file():
        raise FileNotFoundError
    with path.open("rb") as file:
        data = file.read(MAX_BYTES + 1)
    if len(data) > MAX_BYTES:
        raise BrokenImage(
            f"image {printable(path.name)} has more than {MAX_BYTES:,} bytes; shrink it"
        )
    return data


def to_pixels(image: Image.Image, width: int, height: int) -> Tensor:
    """Pixels 13PP in [-1, 1] of the picture at that size: scaled to cover it, its middle kept."""
    fitted = ImageOps.fit(image, (width, height), method=Image.Resampling.LANCZOS)
    levels = torch.from_numpy(numpy.array(fitted)).permute(2, 0, 1)
    return (levels.float() / 127.5 - 1).unsqueeze(0)


def to_images(pixels_B3PP: Tensor) -> list[Image.Image]:
    """8-bit pictures of pixels in [-1, 1], with the stock pipelines' rounding."""
    levels = ((pixels_B3PP / 2 + 0.5).clamp(0, 1) * 255).round().to("cpu", torch.uint8)
    return [Image.fromarray(each.numpy()) for each in levels.permute(0, 2, 3, 1)]


def save_images(
    images: Sequence[Image.Image],
    folder: Path,
    file_format: str = FORMATS[0],
    quality: int = QUALITY,
    metadata: bool = True,
) -> list[Path]:
    """Writes `image-0.webp`, … into the folder, numbered after those that are there already.

    No file is overwritten, also not one that another process writes meanwhile. `file_format` is
    webp, jpg or png; `quality`, from 1 to 100, is of the first two. With `metadata` a file holds
    what `inference.image_metadata` knows of its picture.
    """
    folder.mkdir(parents=True, exist_ok=True)
    paths: list[Path] = []
    for image in images:
        options = {} if file_format == "png" else {"quality": quality}
        if metadata:
            texts = {
                key: image.info[key]
                for key in (image_metadata.TEXT, image_metadata.JSON)
                if key in image.info
            }
            options |= image_metadata.options(texts, file_format)
        # Into memory first: of a full disk Pillow only says "encoder error".
        encoded = io.BytesIO()
        image.save(encoded, format="jpeg" if file_format == "jpg" else file_format, **options)
        path = _new_file(folder, file_format)
        try:
            with atomic_file(path) as file:
                file.write(encoded.getvalue())
        except BaseException:
            path.unlink(missing_ok=True)
            raise
        paths.append(path)
    return paths


def _new_file(folder: Path, file_format: str) -> Path:
    """An empty `image-N` that was not there before; N is higher than every number in the folder."""
    stems = [old.stem.removeprefix("image-") for old in folder.glob("image-*.*")]
    number = max((int(stem) for stem in stems if _NUMBER.fullmatch(stem)), default=-1) + 1
    while True:
        path = folder / f"image-{number}.{file_format}"
        try:
            path.open("xb").close()
        except FileExistsError:  # another process was faster
            number += 1
            continue
        return path


def writable_folder(path: str | PathLike[str]) -> Path:
    """The folder for a request's images, made if it is missing, before anything is generated.

    Raises OSError with one sentence where nothing can be written there.
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
    """A new temporary folder for one request's images, removed where the block fails.

    Afterwards the folders that this user's requests made more than an hour ago are removed. Raises
    OSError naming the temporary folder where there is no room.
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
    """Never fails: the folder may be shared with other users, and other processes clean it too."""
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
                os.rmdir(each.path)  # fails where somebody has put another file
        except OSError:
            continue
