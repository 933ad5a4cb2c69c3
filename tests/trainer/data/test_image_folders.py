"""The folders that finished images are in: on a server temporary ones, kept for an hour."""

import os
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import pytest
from PIL import Image

from inference.images import (
    BrokenImage,
    fresh_folder,
    read_image,
    save_images,
    writable_folder,
)

HOURS_AGO = time.time() - 7200


@pytest.fixture(autouse=True)
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return tmp_path


def old_folder(parent: Path, name: str, *files: str) -> Path:
    folder = parent / f"zeroprior-images-{name}"
    folder.mkdir()
    for file in files:
        (folder / file).write_bytes(b"x")
    os.utime(folder, (HOURS_AGO, HOURS_AGO))
    return folder


def test_folders_of_an_hour_ago_are_removed_and_newer_ones_are_not(temporary: Path) -> None:
    old = old_folder(temporary, "old", "image-0.png", "image-1.webp")
    new = old_folder(temporary, "new", "image-0.png")
    os.utime(new)
    with fresh_folder() as folder:
        save_images([Image.new("RGB", (8, 8))], folder)
        assert old.exists()  # not before the images are written
    assert not old.exists()
    assert new.exists() and [file.name for file in folder.iterdir()] == ["image-0.webp"]


def test_nothing_that_somebody_else_put_there_is_removed(temporary: Path) -> None:
    own = old_folder(temporary, "with-notes", "image-0.png", "notes.txt")
    target = temporary / "photos"
    target.mkdir()
    (target / "image-0.png").write_bytes(b"x")
    link = temporary / "zeroprior-images-link"
    link.symlink_to(target)
    os.utime(link, (HOURS_AGO, HOURS_AGO), follow_symlinks=False)
    file = temporary / "zeroprior-images-file"
    file.write_bytes(b"x")
    os.utime(file, (HOURS_AGO, HOURS_AGO))
    with fresh_folder():
        pass
    assert (own / "notes.txt").exists() and (target / "image-0.png").exists()
    assert link.is_symlink() and file.exists()


@pytest.mark.parametrize("call", ["os.scandir", "os.rmdir", "pathlib.Path.unlink", "os.getuid"])
def test_a_folder_that_cannot_be_cleaned_stops_no_request(
    call: str, temporary: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a folder of another user, or one that another process removes at the same moment."""
    old_folder(temporary, "old", "image-0.png")

    def refuse(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied") if "uid" not in call else FileNotFoundError

    with fresh_folder() as folder:
        (path,) = save_images([Image.new("RGB", (8, 8))], folder)
        monkeypatch.setattr(call, refuse)
    assert path.exists()


def test_folders_of_other_users_are_left_alone(
    temporary: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    old = old_folder(temporary, "old", "image-0.png")
    monkeypatch.setattr("os.getuid", lambda: 99999)
    with fresh_folder():
        pass
    assert (old / "image-0.png").exists()


@pytest.mark.parametrize("file_format", ["png", "jpg", "webp"])
def test_a_full_temporary_folder_is_named_and_nothing_is_left(
    file_format: str, temporary: Path, fill_the_disk: Callable[[], None]
) -> None:
    noise = Image.frombytes("RGB", (400, 400), os.urandom(3 * 400 * 400))
    fill_the_disk()
    with pytest.raises(OSError, match="no space for the images .* set TMPDIR") as error:
        with fresh_folder() as folder:
            save_images([noise], folder, file_format, quality=100)
    assert str(temporary) in str(error.value)
    assert list(temporary.iterdir()) == []


def test_without_any_temporary_folder_the_error_says_how_to_choose_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", None)
    monkeypatch.setattr(tempfile, "_candidate_tempdir_list", lambda: ["/nowhere"])
    with pytest.raises(OSError, match="no temporary folder for the images; set TMPDIR"):
        with fresh_folder():
            pass


def test_an_image_that_is_a_device_or_a_pipe_is_not_read(temporary: Path) -> None:
    os.mkfifo(temporary / "pipe")
    for path in (temporary / "pipe", "/dev/zero", temporary, temporary / "none\x1b[31m.png"):
        with pytest.raises(BrokenImage, match="no such file") as refused:
            read_image(path)
        assert str(refused.value).isprintable()


def test_an_image_file_that_is_too_large_is_not_decoded(
    temporary: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("inference.images.MAX_BYTES", 1000)
    path = temporary / "large.png"
    Image.frombytes("RGB", (64, 64), os.urandom(64 * 64 * 3)).save(path)
    with pytest.raises(BrokenImage, match="large.png has more than 1,000 bytes; shrink it"):
        read_image(path)


def save_one(folder: Path, level: int) -> Path:
    return save_images([Image.new("RGB", (8, 8), (level, 0, 0))], folder, "png")[0]


def test_processes_that_write_to_one_folder_overwrite_nothing(tmp_path: Path) -> None:
    levels = range(40)
    with ProcessPoolExecutor(4, get_context("fork")) as pool:
        paths = list(pool.map(save_one, [tmp_path] * len(levels), levels))
    assert len(set(paths)) == len(levels)
    for path, level in zip(paths, levels, strict=True):
        with Image.open(path) as image:
            assert image.getpixel((0, 0)) == (level, 0, 0)


def test_a_number_that_is_taken_meanwhile_is_passed_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "image-0.webp").write_bytes(b"of another process")
    (tmp_path / "image-1.webp").symlink_to(tmp_path / "nowhere.webp")
    monkeypatch.setattr(Path, "glob", lambda *_: iter(()))  # both are made after the count
    (path,) = save_images([Image.new("RGB", (8, 8))], tmp_path)
    assert path.name == "image-2.webp"
    assert (tmp_path / "image-0.webp").read_bytes() == b"of another process"
    assert not (tmp_path / "nowhere.webp").exists()


def test_names_that_only_look_like_numbers_are_not_counted(tmp_path: Path) -> None:
    for name in ("image-².png", "image-1b.png", "image-007.webp"):
        (tmp_path / name).write_bytes(b"")
    (path,) = save_images([Image.new("RGB", (8, 8))], tmp_path)
    assert path.name == "image-8.webp"


def test_a_folder_that_cannot_be_written_to_is_named_before_anything_is_generated(
    tmp_path: Path,
) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(OSError, match="^images cannot be written to .*/file/images .*output_dir"):
        writable_folder(tmp_path / "file" / "images")
