"""Builds datasets as strangers send them: pictures, zips, tars and folders."""

import io
import struct
import tarfile
import zipfile
import zlib

import pytest
from PIL import Image

from trainer.data.dataset import DatasetError, read_dataset

RED, WHITE = (255, 0, 0), (255, 255, 255)


def encoded(image, format="PNG", **options):
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def picture(width=32, height=24, color=RED, format="PNG", **options):
    return encoded(Image.new("RGB", (width, height), color), format, **options)


def make_zip(path, files, compression=zipfile.ZIP_DEFLATED):
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return path


def make_tar(path, files, mode="w"):
    with tarfile.open(path, mode) as archive:
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return path


def make_folder(path, files):
    for name, content in files.items():
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_bytes(content)
    return path


def problems_of(archive, default_caption="a photo", subject=None):
    with pytest.raises(DatasetError) as caught:
        read_dataset(archive, default_caption, subject)
    return str(caught.value).splitlines()


def png_claiming(width, height):
    """A tiny PNG whose header claims any size."""
    header = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    body = b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + header
    body += struct.pack(">I", zlib.crc32(header))
    return body + picture()[33:]
