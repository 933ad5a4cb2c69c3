"""Archives that mean harm, as a dataset and as weights, as zip and as tar: each is refused by name.

Every case of the table is read under watch: nothing is written outside a folder of its own, that
folder is left empty, and memory, processor time and the largest file stay bounded.
"""

import os
import random
import stat
import struct
import tarfile
import zipfile
from pathlib import Path

import pytest
from archive_kinds import KINDS, TARS, ZIPS, Kind, directory_of, kinds, tar_header
from dataset_files import make_zip, picture
from watched import watched

from adapters.archive import BrokenArchive, read_archive
from trainer.data.dataset import DatasetError, read_dataset

# ---- Names ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["../evil", "/etc/evil", "a/../../evil", "C:\\evil", "..\\evil", "//server/evil"]
)
@kinds(*KINDS)
def test_names_that_lead_out_of_the_archive(kind: Kind, name: str, tmp_path: Path) -> None:
    name += kind.suffix
    path = kind.pack(tmp_path / "set", kind.good() | {name: b"evil"})
    message = kind.refusal(path)
    assert name in message and "has a path outside of the archive" in message


@kinds(*KINDS)
def test_overlong_names(kind: Kind, tmp_path: Path) -> None:
    path = kind.pack(tmp_path / "set", kind.good() | {"x" * 2000 + kind.suffix: b"x"})
    assert "has a name of more than 1,000 characters; rename it" in kind.refusal(path)


@kinds(*KINDS)
def test_a_file_without_a_name(kind: Kind, tmp_path: Path) -> None:
    path = kind.pack(tmp_path / "set", kind.good() | {".": b"x"})
    assert "is a file without a name" in kind.refusal(path)


@kinds(*ZIPS)
def test_a_name_of_no_letters(kind: Kind, tmp_path: Path) -> None:
    """Found by fuzzing: the standard library looks at the last letter."""
    path = tmp_path / "set"
    path.write_bytes(directory_of(1, b""))
    assert "is a file without a name" in kind.refusal(path)


@kinds(*KINDS)
def test_the_same_name_twice(kind: Kind, tmp_path: Path) -> None:
    (name, content), *_ = kind.good().items()
    path = kind.pack(tmp_path / "set", {name: content, f"./{name}": content})
    assert f"{name}" in kind.refusal(path) and "is in the archive twice" in kind.refusal(path)


@kinds(*KINDS)
def test_names_that_differ_in_their_unicode_form_alone(kind: Kind, tmp_path: Path) -> None:
    files = {f"caf\u00e9{kind.suffix}": b"x", f"cafe\u0301{kind.suffix}": b"x"}
    path = kind.pack(tmp_path / "set", kind.good() | files)
    message = kind.refusal(path)
    assert f"é{kind.suffix}" in message.replace("e\u0301", "é")
    assert "is in the archive twice" in message


@kinds(*KINDS)
def test_names_that_differ_in_case_alone_are_two(kind: Kind, tmp_path: Path) -> None:
    """Nothing is extracted, so that no file system can make them one."""
    (name, content), *_ = kind.good().items()
    other = name.upper() if kind.room == "dataset" else "LORA/LORA_WEIGHTS.SAFETENSORS"
    path = kind.pack(tmp_path / "set", {name: content, other: content})
    with watched(tmp_path / "own"):
        found = kind.read(path)
    assert len(found) == (2 if kind.room == "dataset" else 1)


# ---- What is no plain file -----------------------------------------------------------------------

TAR_TYPES = {
    "a symbolic link": tarfile.SYMTYPE,
    "a hard link": tarfile.LNKTYPE,
    "a character device": tarfile.CHRTYPE,
    "a block device": tarfile.BLKTYPE,
    "a pipe": tarfile.FIFOTYPE,
    "a sparse file": tarfile.GNUTYPE_SPARSE,
    "an unknown type": b"?",
}
ZIP_TYPES = {
    "a symbolic link": stat.S_IFLNK,
    "a character device": stat.S_IFCHR,
    "a block device": stat.S_IFBLK,
    "a pipe": stat.S_IFIFO,
    "a socket": stat.S_IFSOCK,
}


@pytest.mark.parametrize("type_", TAR_TYPES.values(), ids=TAR_TYPES)
@kinds(*TARS)
def test_links_and_devices_in_a_tar(kind: Kind, type_: bytes, tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.write_bytes(next(iter(kind.good().values())))
    path = tmp_path / "set"
    with tarfile.open(path, "w", format=tarfile.GNU_FORMAT) as tarred:
        info = tarfile.TarInfo(f"evil{kind.suffix}")
        info.type, info.linkname = type_, str(secret)
        tarred.addfile(info)
    assert f"evil{kind.suffix}" in kind.refusal(path)
    assert "is a link, device or sparse file" in kind.refusal(path)


@pytest.mark.parametrize("type_", ZIP_TYPES.values(), ids=ZIP_TYPES)
@kinds(*ZIPS)
def test_links_and_devices_in_a_zip(kind: Kind, type_: int, tmp_path: Path) -> None:
    path = tmp_path / "set"
    with zipfile.ZipFile(path, "w") as zipped:
        link = zipfile.ZipInfo(f"evil{kind.suffix}")
        link.create_system, link.external_attr = 3, (type_ | 0o777) << 16
        zipped.writestr(link, "/etc/passwd")
    assert f"evil{kind.suffix}" in kind.refusal(path)
    assert "is a link or device" in kind.refusal(path)


@kinds(*ZIPS)
def test_unusual_packing(kind: Kind, tmp_path: Path) -> None:
    (name, content), *_ = kind.good().items()
    path = make_zip(tmp_path / "set", {name: content}, zipfile.ZIP_LZMA)
    assert name in kind.refusal(path) and "is packed in an unusual way" in kind.refusal(path)


# ---- Damage --------------------------------------------------------------------------------------


def patched(path: Path, offset: int, value: bytes) -> Path:
    """The zip, in whose directory one field of the first member says something else."""
    content = bytearray(path.read_bytes())
    at = content.index(b"PK\x01\x02") + offset
    content[at : at + len(value)] = value
    path.write_bytes(content)
    return path


@kinds(*ZIPS)
def test_encrypted_members(kind: Kind, tmp_path: Path) -> None:
    path = patched(kind.pack(tmp_path / "set", kind.good()), 8, b"\x01\x00")
    (name,) = kind.good()
    assert name in kind.refusal(path)
    assert "is encrypted; pack the archive without a password" in kind.refusal(path)


@pytest.mark.parametrize(("more", "packing"), [(1000, 8), (-10, 8), (1000, 0), (-10, 0)])
@kinds(*ZIPS)
def test_a_zip_that_lies_about_sizes(kind: Kind, more: int, packing: int, tmp_path: Path) -> None:
    ((name, content),) = kind.good().items()
    path = make_zip(tmp_path / "set", {name: content}, packing)
    message = kind.refusal(patched(path, 24, struct.pack("<I", len(content) + more)))
    assert name in message
    assert any(
        words in message
        for words in (
            "is truncated",
            "Bad CRC-32",
            "not a whole safetensors file",
            "cannot be read",
        )
    )


@kinds(*TARS)
def test_a_tar_that_lies_about_sizes(kind: Kind, tmp_path: Path) -> None:
    ((name, content),) = kind.good().items()
    path = tmp_path / "set"
    path.write_bytes(tar_header(name, len(content) + 100_000) + content + bytes(2048))
    message = kind.refusal(path)
    assert "is truncated" in message or "is damaged" in message


@kinds(*TARS)
def test_a_broken_tar_header_does_not_pass_for_the_end(kind: Kind, tmp_path: Path) -> None:
    path = kind.pack(tmp_path / "set", kind.good() | {"b.txt": b"x"})
    content = bytearray(path.read_bytes())
    content[content.index(b"b.txt")] ^= 1
    path.write_bytes(content)
    assert "is damaged or truncated (no end mark)" in kind.refusal(path)


@kinds(*KINDS)
def test_truncated_archives(kind: Kind, tmp_path: Path) -> None:
    path = kind.pack(tmp_path / "set", kind.good() | {"b.txt": b"x"})
    whole = path.read_bytes()
    # A tar ends in two blocks of zeros, and padding; without the second it is whole.
    end = len(whole) if kind.container == "zip" else len(whole.rstrip(b"\0")) // 512 * 512 + 1024
    for length in random.Random(0).sample(range(1, end), 30):
        path.write_bytes(whole[:length])
        kind.refusal(path)


@kinds(*KINDS)
def test_archives_with_a_flipped_bit_are_refused_or_read(kind: Kind, tmp_path: Path) -> None:
    """What is read from a zip is right: its sums say so. A tar has none over its contents."""
    path = kind.pack(tmp_path / "set", kind.good())
    whole, right = path.read_bytes(), [*kind.read(path).values()]
    end = len(whole) if kind.container == "zip" else len(whole.rstrip(b"\0"))
    chance = random.Random(1)
    refused = 0
    for _ in range(60):
        content = bytearray(whole)
        content[chance.randrange(end)] ^= 1 << chance.randrange(8)
        path.write_bytes(content)
        with watched(tmp_path / "own"):
            try:
                found = [*kind.read(path).values()]
            except (DatasetError, BrokenArchive):
                refused += 1
            else:
                assert kind.container == "tar" or found == right
    assert refused > 5


# ---- What is taken, and what only looks like it --------------------------------------------------


@kinds(*ZIPS)
def test_a_zip64_archive_is_read(kind: Kind, tmp_path: Path) -> None:
    path = tmp_path / "set"
    with zipfile.ZipFile(path, "w") as zipped:
        for name, content in kind.good().items():
            with zipped.open(name, "w", force_zip64=True) as file:
                file.write(content)
    assert len(kind.read(path)) == 1


@kinds(*ZIPS)
def test_a_zip64_directory_that_claims_all_there_is(kind: Kind, tmp_path: Path) -> None:
    whole = bytearray(directory_of(3))
    at = whole.index(b"PK\x06\x06")
    for size in (1 << 62, (1 << 64) - 1):
        whole[at + 40 : at + 48] = struct.pack("<Q", size)
        path = tmp_path / "set"
        path.write_bytes(whole)
        assert "is damaged" in kind.refusal(path) or "oversized" in kind.refusal(path)


@pytest.mark.parametrize("start", [picture(format="JPEG"), b"#!/bin/sh\nexit\n", b"%PDF-1.7\n"])
@kinds(*ZIPS)
def test_a_zip_behind_another_file_is_not_a_zip(kind: Kind, start: bytes, tmp_path: Path) -> None:
    path = kind.pack(tmp_path / "set", kind.good())
    path.write_bytes(start + path.read_bytes())
    assert zipfile.is_zipfile(path)
    message = kind.refusal(path)
    reasons = ("is not a zip or tar file", "is not a whole safetensors file", ", not a LoRA")
    assert any(reason in message for reason in reasons)


PAGE = b"<!DOCTYPE html>\n<html><title>403 Forbidden</title></html>"
POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a214614ab\nsize 12345\n"


@pytest.mark.parametrize(
    ("content", "what"), [(PAGE, "a web page"), (POINTER, "pointer, not the file itself")]
)
@kinds(*KINDS)
def test_what_was_downloaded_in_place_of_the_file(
    kind: Kind, content: bytes, what: str, tmp_path: Path
) -> None:
    path = tmp_path / "set"
    path.write_bytes(content)
    assert what in kind.refusal(path)
    (name,) = kind.good()
    message = kind.refusal(kind.pack(tmp_path / "set", {name: content}))
    assert name in message and what in message


@kinds(*ZIPS)
def test_what_macos_packs_beside_the_files_is_left_out(kind: Kind, tmp_path: Path) -> None:
    (name,) = kind.good()
    folder, slash, file = name.rpartition("/")
    junk = {f"__MACOSX/{folder}{slash}._{file}": b"resource fork", ".DS_Store": b"junk"}
    path = make_zip(tmp_path / "set", kind.good() | junk)
    assert len(kind.read(path)) == 1


def test_a_pipe_in_place_of_a_file_is_not_waited_for(tmp_path: Path) -> None:
    path = tmp_path / "set"
    os.mkfifo(path)
    with pytest.raises(BrokenArchive, match="no such file"):
        read_archive(path)
    with pytest.raises(DatasetError, match="is not a file"):
        read_dataset(path, "a photo")


# ---- The watch itself ----------------------------------------------------------------------------


def test_the_watch_sees_what_is_written_elsewhere(tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match="outside"):
        with watched(tmp_path / "own"):
            (tmp_path / "outside").write_bytes(b"x")


def test_the_watch_sees_what_is_left_behind(tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match="left"):
        with watched(tmp_path / "own"):
            (tmp_path / "own" / "left").write_bytes(b"x")


def test_the_watch_bounds_memory_and_files(tmp_path: Path) -> None:
    with watched(tmp_path / "own"), pytest.raises(MemoryError):
        bytes(4 << 30)  # more than what earlier tests have freed within the process
    path = tmp_path / "own" / "large"
    with watched(tmp_path / "own"):
        with pytest.raises(OSError), path.open("wb") as file:
            file.truncate(100 << 20)
        path.unlink()
