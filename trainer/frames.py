"""zeroprior frames VIDEO -o FOLDER: writes frames of a video as training images.

Of each interval the sharpest frame is written, unless it is nearly the same as one before it. A
program of the user's decodes the video, ffmpeg: the wheels that contain decoders are under the GPL,
and training needs none.
"""

import glob
import logging
import os
import shutil
import subprocess
import tempfile
from collections.abc import Generator, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import IO, TYPE_CHECKING

from PIL import Image

from inference.console import begin, log_to_console, one_message
from inference.flags import Parser

if TYPE_CHECKING:
    from trainer.data import Measures

log = logging.getLogger(__name__)

CANDIDATES = 8  # frames of each interval, of which the sharpest is written
RECENT = 16  # written frames that a new one is compared with
MOST_SECONDS = 3 * 3600  # of a video
MOST_FRAMES = 1000  # written
MOST_PIXELS = 89_478_485  # of a frame, as of a training image
QUALITY = 95  # of the JPEGs
_EVERY = 0.1, 3600.0  # seconds
# Formats that contain a video. Playlists, which name other files, are not among them.
_NO_VIDEO = "Format not on whitelist", "matches no streams"  # ffmpeg: another format; only sound
_FORMATS = "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi,mpegts,mpeg,mpegvideo,asf,flv,ogg,gif"


class FramesError(ValueError):
    """The frames cannot be written. The message says why."""


@dataclass(frozen=True)
class Frame:
    """A decoded frame."""

    seconds: float  # from the start
    image: Image.Image  # RGB


def write_frames(video: Path, folder: Path, every: float) -> list[Path]:
    """Writes the sharpest frame of every `every` seconds into the folder, as JPEG files.

    Frames that are nearly the same as one of the last 16 written are skipped. Raises `FramesError`,
    and OSError if a file cannot be written.
    """
    from trainer.data import alike, stacked

    if not video.is_file():
        raise FramesError(f"{video} is not a file; give a video")
    if old := sorted(folder.glob(f"{glob.escape(video.stem)}-*s.jpg")):
        raise FramesError(f"{folder} has frames of this video ({old[0].name}); remove them first")
    written: list[Path] = []
    recent: list[Measures] = []
    same = 0
    with closing(_sharpest(_frames(video, CANDIDATES / every))) as found:
        for frame, measures in found:
            if len(written) == MOST_FRAMES:
                log.warning("stopped after %d frames; give a larger --every", MOST_FRAMES)
                break
            pixels = stacked([each.pixels for each in (measures, *recent)])
            if any(0 in group for group in alike(pixels).nearly_the_same):
                same += 1
                continue
            recent = [measures, *recent][:RECENT]
            path = folder / f"{video.stem}-{frame.seconds:07.1f}s.jpg"
            folder.mkdir(parents=True, exist_ok=True)
            frame.image.save(path, quality=QUALITY, subsampling=0)
            written.append(path)
    frames = "frame" if len(written) == 1 else "frames"
    log.info("%d %s written, %d skipped as nearly the same", len(written), frames, same)
    return written


def _sharpest(frames: Generator[Frame]) -> Generator[tuple[Frame, "Measures"]]:
    """The sharpest of each `CANDIDATES` frames, with its measures."""
    from trainer.data import measure

    with closing(frames):
        while batch := list(islice(frames, CANDIDATES)):
            measured = [(frame, measure(frame.image)) for frame in batch]
            yield max(measured, key=lambda each: each[1].sharpness or 0)


def _frames(video: Path, rate: float) -> Generator[Frame]:
    """The frames at this rate, in Hz, upright. Raises `FramesError`."""
    limits = ["-protocol_whitelist", "file", "-format_whitelist", _FORMATS]
    limits += ["-max_pixels", str(MOST_PIXELS), "-t", str(MOST_SECONDS)]
    chosen = ["-map", "0:v:0", "-vf", f"fps={rate:.6f}", "-pix_fmt", "rgb24"]
    source = ["-i", f"file:{video.absolute()}"]
    with _decoding([*limits, *source, *chosen, "-c:v", "ppm", "-f", "image2pipe"]) as output:
        number = 0
        while frame := _read_ppm(output, number / rate):
            yield frame
            number += 1
    if number / rate >= MOST_SECONDS:
        log.warning("%s: only the first %d hours were read", video.name, MOST_SECONDS // 3600)
    if not number:
        raise FramesError(f"{video.name} has no frame")


@contextmanager
def _decoding(arguments: Sequence[str]) -> Iterator[IO[bytes]]:
    """The output of ffmpeg. Raises `FramesError` if it is missing, or has failed."""
    program = shutil.which("ffmpeg")
    if program is None:
        raise FramesError(
            "videos need the program ffmpeg; install it (apt install ffmpeg, brew install ffmpeg) "
            "and repeat the command"
        )
    command = [program, "-nostdin", "-hide_banner", "-loglevel", "error", *arguments, "-"]
    with tempfile.TemporaryFile() as errors:
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=errors
        )
        assert process.stdout is not None
        try:
            yield process.stdout
            code = process.wait()
        finally:
            process.kill()
            process.wait()
            process.stdout.close()
        if code:
            errors.seek(0)
            said = errors.read(10_000).decode(errors="replace")
            if any(each in said for each in _NO_VIDEO):
                raise FramesError(
                    "the file is not a video, or of a kind that is not read; give an MP4"
                )
            lines = said.strip().splitlines() or [""]
            raise FramesError(
                f"the video cannot be decoded to its end ({lines[-1][:300]}); export it again, as "
                f"MP4 with frames of at most {MOST_PIXELS:,} pixels"
            )


def _read_ppm(output: IO[bytes], seconds: float) -> Frame | None:
    """The next image of a stream; None at the end."""
    if output.readline() != b"P6\n":
        return None
    width, height = map(int, output.readline().split())
    output.readline()  # the maximum, 255
    rgb = output.read(3 * width * height)
    if len(rgb) < 3 * width * height:
        return None
    return Frame(seconds, Image.frombytes("RGB", (width, height), rgb))


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the command in the arguments (default: `sys.argv`). An error is one line."""
    parser = Parser(
        prog="zeroprior frames",
        usage="zeroprior frames VIDEO -o FOLDER [options]",
        description="Write the sharpest frame of every few seconds of a video as training images.\n"
        "Frames that are nearly the same as one before are skipped. Needs ffmpeg.",
        epilog="Example:\n  zeroprior frames robot.mp4 -o robot --every 2\n  zeroprior check robot",
    )
    parser.add_argument("video", metavar="VIDEO", help="MP4, MOV, MKV, WebM, AVI and others")
    parser.add_argument("-o", "--output", metavar="FOLDER", required=True, help="of the images")
    parser.add_argument("--every", type=float, default=2.0, metavar="SECONDS", help="default: 2")
    given = parser.read(arguments)
    debug, every = given.pop("debug", False), given["every"]
    if not _EVERY[0] <= every <= _EVERY[1]:
        parser.error(f"--every is {every:g}; use {_EVERY[0]:g} to {_EVERY[1]:g} seconds")
    begin(f"frames of {given['video']}")
    log_to_console(debug=debug)
    with one_message(debug), one_message(debug, True, FramesError, OSError):
        write_frames(Path(given["video"]).expanduser(), Path(given["output"]).expanduser(), every)
        print(os.fspath(given["output"]))


if __name__ == "__main__":
    main()
