"""Which files of the server a request may name: none, or those below the operator's folders."""

import os
from pathlib import Path

import pytest

from inference.fetch.disk_cache import DiskCache
from inference.fetch.sources import SourceError, Sources, allowed_file


@pytest.fixture
def shelf(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that the operator allows, with files in it and around it."""
    shelf = tmp_path / "shelf"
    for name in ("w.zip", "deep/v.zip", ".hidden/w.zip", ".hidden.zip", "deep/.x/w.zip"):
        (shelf / name).parent.mkdir(parents=True, exist_ok=True)
        (shelf / name).write_bytes(b"x")
    for name in ("secret.zip", "shelf-of-another/w.zip"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"x")
    (shelf / "out.zip").symlink_to(tmp_path / "secret.zip")
    (shelf / "out").symlink_to(tmp_path)
    (shelf / "to-hidden.zip").symlink_to(shelf / ".hidden" / "w.zip")
    (shelf / "circle").symlink_to(shelf / "circle")
    (shelf / "inner.zip").symlink_to("deep/v.zip")
    os.mkfifo(shelf / "pipe")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("ZEROPRIOR_FILES", str(shelf))
    return shelf


def test_without_folders_no_file_may_be_named(shelf: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for value in (None, "", os.pathsep, os.pathsep * 3):
        if value is None:
            monkeypatch.delenv("ZEROPRIOR_FILES")
        else:
            monkeypatch.setenv("ZEROPRIOR_FILES", value)
        for text in ("w.zip", "shelf/w.zip", str(shelf / "w.zip"), "", "."):
            with pytest.raises(SourceError):
                allowed_file(text)


def test_files_below_an_allowed_folder_may_be_named(shelf: Path) -> None:
    assert allowed_file("w.zip") == allowed_file(str(shelf / "w.zip")) == shelf / "w.zip"
    assert allowed_file("deep/v.zip") == allowed_file("inner.zip") == shelf / "deep" / "v.zip"
    assert allowed_file("./deep//v.zip") == shelf / "deep" / "v.zip"


def test_several_folders_may_be_allowed(
    shelf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = tmp_path / ".operators" / "more"  # hidden parts above the folder are the operator's
    other.mkdir(parents=True)
    (other / "m.zip").write_bytes(b"x")
    (tmp_path / "link").symlink_to(other)
    monkeypatch.setenv("ZEROPRIOR_FILES", os.pathsep.join(("", "none", "link", "shelf")))
    assert allowed_file("w.zip") == shelf / "w.zip"
    for text in ("m.zip", str(other / "m.zip"), str(tmp_path / "link" / "m.zip")):
        assert allowed_file(text) == other / "m.zip"


def test_everything_else_is_refused_with_the_same_sentence(shelf: Path, tmp_path: Path) -> None:
    """What exists and what does not, so that nobody can find out which files there are."""
    for text in (
        *("none.zip", "deep", ".", "", "deep/none/w.zip", "w.zip/x"),
        *("../secret.zip", "deep/../w.zip", str(tmp_path / "secret.zip"), "/etc/hostname"),
        *("../shelf-of-another/w.zip", str(tmp_path / "shelf-of-another" / "w.zip")),
        *(".hidden/w.zip", ".hidden.zip", "deep/.x/w.zip", str(shelf / ".hidden.zip")),
        *("out.zip", "out/secret.zip", "to-hidden.zip", "circle", "circle/w.zip", "pipe"),
        *("~/w.zip", "~nobody/w.zip", "~", "file:w.zip", "a" * 5000, "a/" * 5000),
        *("w.zip\0", "\0", "\udcff", "\ud800.zip", "\x1b[31m.zip", "w.zip\n", "/dev/null"),
    ):
        with pytest.raises(SourceError) as refused:
            allowed_file(text)
        message = str(refused.value)
        assert message.isprintable() and len(message) < 1600
        assert str(tmp_path) not in message or str(tmp_path) in text
        assert message.partition(" is not a file that a request may name; ")[2].startswith("send")


def test_only_strings_of_requests_are_held_to_the_allowed_folders(
    shelf: Path, tmp_path: Path
) -> None:
    sources, secret = Sources(cache=DiskCache(tmp_path / "cache")), tmp_path / "secret.zip"
    assert sources.file(str(secret)) == sources.file(secret, any_file=False) == secret
    assert sources.file(" w.zip ", any_file=False) == shelf / "w.zip"
    for text in (str(secret), "file:///etc/hostname", f"file:{secret}", "FILE:///etc/hostname"):
        with pytest.raises(ValueError, match="may name|over https only"):
            sources.file(text, any_file=False)
