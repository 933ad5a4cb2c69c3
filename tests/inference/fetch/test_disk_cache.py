"""The cache of downloads: what killed processes leave, and what other processes remove."""

import os
import time
from pathlib import Path

import pytest

from inference.fetch.disk_cache import DiskCache


def kept(cache: DiskCache, name: str | None, content: bytes) -> Path:
    with cache.part() as part:
        part.write_bytes(content)
        return cache.keep(name, part, None)


def listed(cache: DiskCache, folder: str) -> list[Path]:
    return sorted((cache.folder / folder).glob("*"))


def aged(path: Path, seconds: float) -> None:
    when = time.time() - seconds
    os.utime(path, (when, when))


def test_incomplete_files_of_killed_processes_are_removed_after_an_hour(tmp_path: Path) -> None:
    cache = DiskCache(tmp_path)
    child = os.fork()
    if not child:
        with cache.part() as part:
            part.write_bytes(bytes(1000))
            os.kill(os.getpid(), 9)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -9
    (left,) = listed(cache, "files")
    kept(cache, "a", b"a")
    assert left.exists()  # its process may still be writing
    aged(left, 3700)
    note = cache.folder / "names" / "x.part"
    note.write_bytes(b"x")
    aged(note, 3700)
    kept(cache, "b", b"b")
    assert not left.exists() and not note.exists()
    assert len(listed(cache, "files")) == 2


def test_incomplete_files_count_in_the_budget(tmp_path: Path) -> None:
    cache = DiskCache(tmp_path, budget=1000)
    old = kept(cache, "old", bytes(300))
    aged(old, 100)
    for number in range(2):
        (cache.folder / "files" / f"{number}.part").write_bytes(bytes(300))
    new = kept(cache, "new", b"1" * 200)
    assert (old.exists(), new.exists()) == (False, True)
    assert sum(file.stat().st_size for file in listed(cache, "files")) <= 1000


def test_names_do_not_outlive_their_files(tmp_path: Path) -> None:
    cache = DiskCache(tmp_path, budget=100)
    for number in range(20):
        kept(cache, f"name {number}", b"%60d" % number)
    (cache.folder / "names" / "broken").write_bytes(b"{")
    kept(cache, None, b"last")
    assert len(listed(cache, "names")) <= 2


def test_many_names_of_one_file_are_limited(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("inference.fetch.disk_cache.MOST_NAMES", 5)
    cache = DiskCache(tmp_path)
    for number in range(20):
        kept(cache, f"name {number}", b"same")
    assert len(listed(cache, "names")) <= 6
    assert cache.find("name 19") is not None and cache.find("name 0") is None


def test_a_file_that_another_process_removes_meanwhile_is_no_error(tmp_path: Path) -> None:
    cache = DiskCache(tmp_path)
    path = kept(cache, "a", b"a")
    entry = cache.find("a")
    assert entry is not None
    path.unlink()
    assert cache.use("a", entry) is None and cache.find("a") is None

    scandir = os.scandir
    with pytest.MonkeyPatch.context() as patch:

        def racing(folder: str | Path) -> list[os.DirEntry[str]]:
            entries = list(scandir(folder))
            for each in entries:
                if each.name != kept_name:
                    os.unlink(each.path)
            return entries

        kept(cache, "b", b"b")
        kept_name = "none"
        patch.setattr(os, "scandir", racing)
        cache._evict(tmp_path / "files" / "none")
        cache._clean()
    assert kept(cache, "c", b"c").read_bytes() == b"c"
