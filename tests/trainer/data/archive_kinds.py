"""The kinds of archives that are read: a dataset and weights, as zip and as tar."""

import struct
import tarfile
import zlib
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from dataset_files import make_tar, make_zip, picture
from safetensors.torch import save
from watched import watched

from adapters.archive import LORA, BrokenArchive, read_archive
from trainer.data.dataset import DatasetError, read_dataset

Files = dict[str, bytes]


@cache
def lora() -> bytes:
    """A small LoRA file."""
    layer = "transformer.layers.0.attention.to_q"
    chance = torch.Generator().manual_seed(0)
    down, up = (torch.randn(shape, generator=chance).bfloat16() for shape in ((2, 16), (24, 2)))
    return save({f"{layer}.lora_A.weight": down, f"{layer}.lora_B.weight": up})


@dataclass(frozen=True)
class Kind:
    """One of the four: what is read, from which container."""

    room: str  # dataset or weights
    container: str  # zip or tar

    @property
    def suffix(self) -> str:
        """Of the files that are read from such an archive."""
        return ".png" if self.room == "dataset" else ".safetensors"

    def good(self) -> Files:
        """What makes a whole archive."""
        return {"good.png": picture()} if self.room == "dataset" else {LORA: lora()}

    def pack(self, path: Path, files: Files) -> Path:
        """Packs the files as they are named."""
        return (make_zip if self.container == "zip" else make_tar)(path, files)

    def read(self, path: Path) -> dict[str, Any]:
        """What such an archive is made into: pictures or the layers of a LoRA, by their names."""
        if self.room == "dataset":
            return {each.name: each.data for each in read_dataset(path, "a photo")}
        factors = read_archive(path).factors
        return {name: [each.tolist() for each in pair] for name, pair in factors.items()}

    def refusal(self, path: Path) -> str:
        """The message with which it is refused, under watch."""
        with watched(path.parent / "own"), pytest.raises((DatasetError, BrokenArchive)) as caught:
            self.read(path)
        message = str(caught.value)
        assert all(line.startswith(path.name) for line in message.splitlines())
        return message


DATASET_ZIP, DATASET_TAR = Kind("dataset", "zip"), Kind("dataset", "tar")
WEIGHTS_ZIP, WEIGHTS_TAR = Kind("weights", "zip"), Kind("weights", "tar")
KINDS = (DATASET_ZIP, DATASET_TAR, WEIGHTS_ZIP, WEIGHTS_TAR)
ZIPS, TARS = (DATASET_ZIP, WEIGHTS_ZIP), (DATASET_TAR, WEIGHTS_TAR)


def kinds(*which: Kind) -> pytest.MarkDecorator:
    return pytest.mark.parametrize(
        "kind", which, ids=[f"{kind.room}-{kind.container}" for kind in which]
    )


ZEROS = 100 << 20  # bytes; deflate makes about a thousandth of them


def deflated_zeros(size: int = ZEROS) -> bytes:
    packer = zlib.compressobj(9, zlib.DEFLATED, 31)
    zeros = bytes(1 << 20)
    return b"".join(packer.compress(zeros) for _ in range(size >> 20)) + packer.flush()


def tar_header(name: str, size: int, kind: bytes = tarfile.REGTYPE) -> bytes:
    info = tarfile.TarInfo(name)
    info.size, info.type = size, kind
    return info.tobuf(tarfile.GNU_FORMAT)


def directory_of(count: int, name: bytes = b"a") -> bytes:
    """A zip that is nothing but a directory, of so many empty members (in zip64)."""
    entry = b"PK\x01\x02" + struct.pack(
        "<4B4H3L5H2L",
        *(20, 3, 20, 0),
        *(0, 0, 0, 33),
        *(0, 0, 0),
        *(len(name), 0, 0, 0, 0),
        *(0, 0),
    )
    directory = (entry + name) * count
    start = b"PK\x03\x04" + bytes(26)
    end64 = b"PK\x06\x06" + struct.pack(
        "<Q2H2L4Q", 44, 45, 45, 0, 0, count, count, len(directory), len(start)
    )
    locator = b"PK\x06\x07" + struct.pack("<LQL", 0, len(start) + len(directory), 1)
    end = b"PK\x05\x06" + struct.pack("<4H2LH", 0, 0, 65535, 65535, 0xFFFFFFFF, 0xFFFFFFFF, 0)
    return start + directory + end64 + locator + end
