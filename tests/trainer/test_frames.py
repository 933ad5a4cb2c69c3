"""Frames of a video as training images, decoded by a real ffmpeg."""

import subprocess
from pathlib import Path

import imageio_ffmpeg
import numpy as np
import pytest
from PIL import Image, ImageFilter

from trainer import frames
from trainer.data.measures import measure
from trainer.frames import FramesError, main, write_frames


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An ffmpeg under its usual name."""
    program = tmp_path_factory.mktemp("bin") / "ffmpeg"
    program.symlink_to(imageio_ffmpeg.get_ffmpeg_exe())
    return program


@pytest.fixture(scope="module")
def clip(program: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """3 seconds of 4 frames: two scenes and the first again, blurred but for one frame a second."""
    random, folder = np.random.default_rng(0), tmp_path_factory.mktemp("clip")
    scenes = []
    for _ in range(2):
        coarse = Image.fromarray(random.integers(0, 256, (16, 20, 3), dtype=np.uint8))
        scenes.append(coarse.resize((320, 256), Image.Resampling.NEAREST))
    for number in range(12):
        image = scenes[number // 4 % 2]
        if number % 4 != 2:
            image = image.filter(ImageFilter.GaussianBlur(4))
        image.save(folder / f"{number:02}.png")
    command = [program, "-loglevel", "error", "-framerate", "4", "-i", folder / "%02d.png"]
    subprocess.run([*command, "-c:v", "mpeg4", "-q:v", "2", folder / "clip.mkv"], check=True)
    return folder / "clip.mkv"


@pytest.fixture(autouse=True)
def installed(program: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is found on the path."""
    monkeypatch.setenv("PATH", str(program.parent))


def test_the_sharpest_frame_of_each_second_is_written_once(
    clip: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    main([str(clip), "-o", str(tmp_path / "out"), "--every", "1"])
    written = sorted((tmp_path / "out").iterdir())
    assert [each.name for each in written] == ["clip-00000.5s.jpg", "clip-00001.5s.jpg"]
    assert all((measure(Image.open(each)).sharpness or 0) > 80 for each in written)
    assert capsys.readouterr().out.endswith(f"{tmp_path / 'out'}\n")
    with pytest.raises(SystemExit, match="has frames of this video .clip-00000.5s.jpg"):
        main([str(clip), "-o", str(tmp_path / "out")])


def test_limits_and_what_is_no_video(
    clip: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refusal(video: Path) -> str:
        with pytest.raises(FramesError) as caught:
            write_frames(video, tmp_path / "none", 1.0)
        return str(caught.value)

    with monkeypatch.context() as patch:
        patch.setattr(frames, "MOST_FRAMES", 1)
        assert len(write_frames(clip, tmp_path / "one", 1.0)) == 1
        assert "stopped after 1 frames" in caplog.text
        patch.setattr(frames, "MOST_SECONDS", 1)
        assert len(write_frames(clip, tmp_path / "short", 1.0)) == 1
        patch.setattr(frames, "MOST_PIXELS", 1000)
        assert "with frames of at most 1,000 pixels" in refusal(clip)
    playlist = tmp_path / "list.mp4"
    playlist.write_text(f"ffconcat version 1.0\nfile '{clip}'\n")  # would name any file
    assert "is not a video" in refusal(playlist)
    playlist.write_bytes(clip.read_bytes()[:500])
    assert "cannot be decoded to its end (" in refusal(playlist)
    assert "is not a file" in refusal(tmp_path / "no.mp4")
    assert not (tmp_path / "none").exists()
    monkeypatch.setenv("PATH", "")
    assert "videos need the program ffmpeg; install it" in refusal(clip)


@pytest.mark.parametrize(
    "said",
    [
        "[mp3 @ 0x5] Format not on whitelist 'mov,mp4'\nfile:a.mp3: Invalid argument",
        "Stream map '0:v:0' matches no streams.\nTo ignore this, add a trailing '?' to the map.",
    ],
)
def test_a_sound_or_an_image_is_not_a_video(
    said: str, clip: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = tmp_path / "ffmpeg"
    program.write_text(f'#!/bin/sh\necho "{said}" >&2\nexit 1\n')
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(FramesError, match="the file is not a video"):
        write_frames(clip, tmp_path / "out", 1.0)
