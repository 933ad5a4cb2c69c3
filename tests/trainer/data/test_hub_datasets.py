"""A dataset of the Hub is downloaded once, within limits, and named as it was given."""

import json
import logging
from collections.abc import Iterator
from pathlib import Path

import pytest
from dataset_files import make_zip, picture
from hub_server import Hub

from trainer.__main__ import main
from trainer.captions.places import place_for
from trainer.data import DatasetError, hub
from trainer.data.hub import local_dataset
from trainer.dataset_names import dataset_name, hub_dataset
from trainer.outputs import name_of

FILES = {
    "README.md": b"# Robots",
    "train/1.JPG": picture(format="JPEG"),
    "train/2.png": picture(color=(0, 0, 255)),
    "train/metadata.jsonl": b'{"file_name": "1.JPG", "text": "TOK here"}\n'
    b'{"file_name": "2.png", "text": "TOK there"}\n',
    "clip.mp4": b"video",
}


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A Hub with one dataset; the working folder is empty."""
    with Hub() as server:
        server.use(monkeypatch, tmp_path / "cache")
        (tmp_path / "here").mkdir()
        monkeypatch.chdir(tmp_path / "here")
        server.files["datasets/me/robot"] = dict(FILES)
        yield server


def downloaded(server: Hub) -> set[str]:
    """The files that were asked for since the last call."""
    found = {path.partition("/resolve/")[2].partition("/")[2] for path in server.asked}
    server.asked.clear()
    return found - {""}


def test_it_is_downloaded_once_and_checked(
    server: Hub,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def check(*arguments: str) -> str:
        caplog.clear()
        with pytest.raises(SystemExit) as ended:
            main(["check", *arguments, "--base", "miniature-turbo"])
        assert ended.value.code == 0
        return capsys.readouterr().out

    assert "2 images, 2 with a caption file" in check("hub:me/robot")
    assert Path("outputs/checks/me--robot.html").is_file()
    assert "hub:me/robot: 3 files, " in caplog.text and "Not used: .md, .mp4" in caplog.text
    assert downloaded(server) == {"train/1.JPG", "train/2.png", "train/metadata.jsonl"}

    found = json.loads(check("me/robot@main", "--json"))
    assert [each["caption"] for each in found["images"]] == ["<zwx> here", "<zwx> there"]
    assert downloaded(server) == set()

    # Without a network, also if it is only not reachable.
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert "2 images" in check("hub:me/robot")
    assert server.asked == [] and "using the downloaded files" in caplog.text


def test_an_interrupted_download_is_continued(server: Hub) -> None:
    server.refuse["2.png"] = 403
    with pytest.raises(DatasetError, match="could not be downloaded .*repeat the command"):
        local_dataset(Path("me/robot"))
    downloaded(server)
    server.refuse.clear()
    folder = local_dataset(Path("me/robot"))
    assert "train/1.JPG" not in downloaded(server)
    assert (folder / "train/2.png").read_bytes() == FILES["train/2.png"]
    assert dataset_name(folder) == "me/robot" and name_of(folder) == "me-robot"  # of the run
    # Captions do not go into the cache.
    assert place_for(folder, None).path == Path("me--robot-captioned.zip")


def test_a_single_archive_is_the_dataset(server: Hub, tmp_path: Path) -> None:
    content = make_zip(tmp_path / "a.zip", {"1.png": picture()}).read_bytes()
    server.files["datasets/me/packed"] = {"data/imgs.zip": content, "logo.png": picture(8, 8)}
    path = local_dataset(Path("hub:me/packed"))
    assert path.name == "imgs.zip" and path.read_bytes() == content
    assert dataset_name(path) == "me/packed"
    assert downloaded(server) == {"data/imgs.zip"}


@pytest.mark.parametrize(
    ("given", "files", "complaint"),
    [
        ("me/cats", None, "me/cats does not exist here, and as a dataset of the Hub .*not found"),
        ("hub:me/robot@v2", None, "there is no revision v2"),
        ("hub:me/robot/data", None, "hub:me/robot/data is not the name of a dataset on the Hub"),
        ("hub:me/x", {"data/0.parquet": bytes(99), "a.png": b"1"}, "in Parquet files, which are"),
        ("hub:me/x", {"0.tar": b"1", "1.tar": b"1"}, "2 archives: 0.tar, 1.tar; download one"),
        ("hub:me/x", {"README.md": b""}, r"contains no images \(README.md\)"),
        ("hub:me/x", {"a.png": bytes(2001)}, r"1 files of 0.0 MB, more than the limits"),
    ],
)
def test_what_cannot_be_used_is_refused_before_a_download(
    server: Hub,
    monkeypatch: pytest.MonkeyPatch,
    given: str,
    files: dict[str, bytes] | None,
    complaint: str,
) -> None:
    monkeypatch.setattr(hub, "MAX_TOTAL_BYTES", 2000)
    if files is not None:
        server.files["datasets/me/x"] = files
    with pytest.raises(DatasetError, match=complaint):
        local_dataset(Path(given))
    assert downloaded(server) == set()


def test_accounts_and_networks(
    server: Hub, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    monkeypatch.setenv("HF_TOKEN", server.token)
    server.refuse["1.JPG"], server.codes["1.JPG"] = 403, "GatedRepo"
    with pytest.raises(DatasetError, match="is gated; accept its conditions on .*/datasets/me/r"):
        local_dataset(Path("me/robot"))
    assert f"Bearer {server.token}" in server.authorizations

    server.refuse["me/robot"] = 400
    with pytest.raises(DatasetError, match=r"refused Bearer \*\*\*\*") as caught:
        local_dataset(Path("me/robot"))
    assert server.token not in str(caught.value) + caplog.text

    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(DatasetError, match="hub:me/fish could not be downloaded .*Connect"):
        local_dataset(Path("hub:me/fish"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(DatasetError, match="is not downloaded, or not completely; unset HF_HUB"):
        local_dataset(Path("hub:me/fish"))


def test_paths_are_not_looked_for_on_the_hub(server: Hub) -> None:
    Path("imgs").mkdir()
    paths = "imgs/robot", "cats/a.zip", "imgs", "/me/robot", "./me/robot", "a/b/c", "me/list.jsonl"
    assert [hub_dataset(each) for each in paths] == [None] * len(paths)
    assert hub_dataset("hub:imgs/robot") is not None
