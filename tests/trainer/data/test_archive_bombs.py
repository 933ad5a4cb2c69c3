"""Archives that unpack to far more than they hold are refused by name, under watch."""

import gzip
import tarfile
import zipfile
from pathlib import Path

import pytest
from archive_kinds import (
    KINDS,
    TARS,
    ZEROS,
    ZIPS,
    Kind,
    deflated_zeros,
    directory_of,
    kinds,
    tar_header,
)
from dataset_files import make_zip
from watched import watched


def zipped_zeros(path: Path, name: str) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as zipped:
        with zipped.open(name, "w") as file:
            for _ in range(ZEROS >> 20):
                file.write(bytes(1 << 20))
    return path


def gzipped_zeros(path: Path, name: str) -> Path:
    """Members of a gzip file may follow each other."""
    parts = gzip.compress(tar_header(name, ZEROS)), deflated_zeros(), gzip.compress(bytes(1024))
    path.write_bytes(b"".join(parts))
    return path


@kinds(*KINDS)
def test_a_bomb_of_a_thousand_to_one(kind: Kind, tmp_path: Path) -> None:
    name = f"bomb{kind.suffix}"
    make = zipped_zeros if kind.container == "zip" else gzipped_zeros
    path = make(tmp_path / "set", name)
    assert path.stat().st_size < ZEROS / 900
    message = kind.refusal(path)
    assert name in message
    assert "unpacks to 104,857,600 bytes" in message or "is compressed more than 100:1" in message


@kinds(*KINDS)
def test_a_bomb_within_a_bomb_stays_packed(kind: Kind, tmp_path: Path) -> None:
    inner = zipped_zeros(tmp_path / "inner", "bomb").read_bytes()
    for depth in range(3):
        inner = make_zip(tmp_path / "inner", {f"{depth}.zip": inner, "b.zip": inner}).read_bytes()
    path = kind.pack(tmp_path / "set", kind.good() | {"inner.zip": inner})
    with watched(tmp_path / "own"):
        assert len(kind.read(path)) == 1
    path = kind.pack(tmp_path / "set", {f"inner{kind.suffix}": inner})
    message = kind.refusal(path)
    assert f"inner{kind.suffix}" in message
    assert "begins like a zip archive" in message or "is a zip archive, not a LoRA" in message


@pytest.mark.parametrize(
    ("count", "complaint"),
    [(1_000_000, "has an oversized directory"), (80_000, "is in the archive twice")],
)
@kinds(*ZIPS)
def test_a_zip_of_a_million_members(kind: Kind, count: int, complaint: str, tmp_path: Path) -> None:
    path = tmp_path / "set"
    path.write_bytes(directory_of(count))
    assert complaint in kind.refusal(path)


@pytest.mark.parametrize("type_", [tarfile.REGTYPE, tarfile.DIRTYPE, tarfile.SYMTYPE])
@kinds(*TARS)
def test_a_tar_of_a_million_members(kind: Kind, type_: bytes, tmp_path: Path) -> None:
    path = tmp_path / "set"
    names = (f"{number}.log" for number in range(20_000))
    some = gzip.compress(b"".join(tar_header(name, 0, type_) for name in names), 1)
    path.write_bytes(some * 50)
    message = kind.refusal(path)
    assert "contains more than" in message or "is a link" in message


@kinds(*TARS)
def test_a_tar_that_claims_a_terabyte(kind: Kind, tmp_path: Path) -> None:
    path = tmp_path / "set"
    path.write_bytes(tar_header(f"huge{kind.suffix}", 1 << 40) + bytes(1024))
    message = kind.refusal(path)
    assert "unpacks to more than" in message and f"huge{kind.suffix}" in message


@pytest.mark.parametrize("type_", [tarfile.GNUTYPE_LONGNAME, tarfile.XHDTYPE])
@kinds(*TARS)
def test_a_tar_header_that_goes_on_for_ever(kind: Kind, type_: bytes, tmp_path: Path) -> None:
    path = tmp_path / "set"
    path.write_bytes(gzip.compress(tar_header("././@LongLink", 1 << 30, type_)) + deflated_zeros())
    assert "has an oversized directory or header" in kind.refusal(path)


@kinds(*TARS)
def test_tar_headers_that_announce_each_other(kind: Kind, tmp_path: Path) -> None:
    path = tmp_path / "set"
    path.write_bytes(tar_header("././@LongLink", 0, tarfile.GNUTYPE_LONGNAME) * 5000 + bytes(1024))
    assert "is damaged" in kind.refusal(path)


@kinds(*TARS)
def test_a_gzip_that_goes_on_behind_the_end_of_its_tar(kind: Kind, tmp_path: Path) -> None:
    path = kind.pack(tmp_path / "set", kind.good())
    path.write_bytes(gzip.compress(path.read_bytes()) + deflated_zeros())
    assert "has too much data after its end mark" in kind.refusal(path)
