"""Time and memory of `zeroprior check` and of reading a dataset, with photos of 12 megapixels.

python -m lab.benchmarks.dataset [--images 1000] [--heic PHOTO.heic]

The photos are synthetic: noise at all scales, like a photo's, and coloured shapes. `BASES` are
made; the other files have the same pixels under other names. HEIC needs a photo, since nothing here
can write one. Files are in a temporary folder (TMPDIR), about 4 GB.
"""

import argparse
import contextlib
import io
import os
import resource
import shutil
import tarfile
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from lab.benchmarks.machine import machine
from lab.benchmarks.preparation import in_a_process, resident
from trainer.checking import check, with_usual_base
from trainer.data.dataset import read_dataset
from trainer.settings.fields import resolve
from trainer.settings.inputs import TrainingInputs

SIZE = 4000, 3000  # pixels
BASES = 12  # different photos
GRAIN = 3.5  # deviation of a sensor's noise, of 255
LARGE = 10  # members of the tar.gz, TIFFs without compression of 36 MB


@dataclass(frozen=True)
class Row:
    """What one measurement took."""

    what: str
    images: int
    megabytes: float  # of the files
    wall: float  # seconds
    processor: float  # seconds of user and system, all threads
    own: float  # MB, the most memory outside of files (RssAnon)
    peak: float  # MB, the most with mapped files, whose pages the system can free (VmHWM)


def photo(number: int) -> Image.Image:
    """A synthetic photo: noise of all scales, each half as strong as the one above it."""
    random = np.random.default_rng(number)
    total: NDArray[np.float32] = np.zeros((SIZE[1], SIZE[0], 3), dtype=np.float32)
    for octave in range(10):
        side = 4 << octave
        coarse = random.integers(0, 256, (side * 3 // 4, side, 3), dtype=np.uint8)
        fine = Image.fromarray(coarse).resize(SIZE, Image.Resampling.BILINEAR)
        total += (np.asarray(fine, dtype=np.float32) - 128) * 0.6 * 0.7**octave
    total += random.normal(0, GRAIN, (SIZE[1], SIZE[0], 1)).astype(np.float32)
    image = Image.fromarray((128 + total).clip(0, 255).astype(np.uint8))
    draw = ImageDraw.Draw(image)
    for _ in range(12):
        x, y, radius = (int(random.integers(*each)) for each in ((SIZE[0],), (SIZE[1],), (40, 700)))
        color = tuple(int(each) for each in random.integers(0, 256, 3))
        draw.ellipse((x - radius, y - radius, x + radius, y + radius), fill=color)
    return image


def write_folder(folder: Path, bases: Sequence[Path], count: int) -> Path:
    """A folder of JPEGs with captions, hard links of a few."""
    folder.mkdir()
    for number in range(count):
        path = folder / f"{number:04}.jpg"
        os.link(bases[number % len(bases)], path)
        path.with_suffix(".txt").write_text(f"TOK in place number {number}")
    return folder


def write_tar_gz(path: Path, bases: Sequence[Path]) -> Path:
    """A tar.gz with large members: TIFFs that hardly compress."""
    with tarfile.open(path, "w:gz", compresslevel=1) as archive:
        for number in range(LARGE):
            Image.open(bases[number]).save(encoded := io.BytesIO(), "TIFF")
            info = tarfile.TarInfo(f"{number}.tif")
            info.size = len(encoded.getvalue())
            encoded.seek(0)
            archive.addfile(info, encoded)
    return path


def copies(source: Path, folder: Path, count: int) -> Path:
    """A folder with so many hard links of a file, or copies on another disk."""
    folder.mkdir()
    for number in range(count):
        shutil.copy(source, folder / f"{number}{source.suffix}")
    return folder


def checked(dataset: Path) -> None:
    """`zeroprior check`, with its page."""
    given = with_usual_base({"dataset": str(dataset)}, None)
    settings = resolve(TrainingInputs(**given))
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
        assert check(settings, os.fspath(dataset.with_suffix(".html"))) == 0


def read(dataset: Path) -> None:
    """What a run does first."""
    read_dataset(dataset, "a photo of TOK", "<zwx>")


def measured(work: Callable[[Path], None], dataset: Path) -> tuple[float, float, float, float]:
    """Wall-clock and processor seconds, and the two peaks of memory in MB."""
    own = [0]
    with sampled(lambda: own.append(max(own.pop(), resident("RssAnon")))):
        before, start = resource.getrusage(resource.RUSAGE_SELF), time.perf_counter()
        work(dataset)
        wall, after = time.perf_counter() - start, resource.getrusage(resource.RUSAGE_SELF)
    processor = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return wall, processor, own[0] / 1e6, resident("VmHWM") / 1e6


@contextlib.contextmanager
def sampled(work: Callable[[], object]) -> Iterator[None]:
    """Calls `work` every 20 ms, in a thread."""
    done = threading.Event()

    def repeat() -> None:
        while not done.wait(0.02):
            work()

    thread = threading.Thread(target=repeat)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


def rows(count: int, heic: Path | None, folder: Path) -> Iterator[Row]:
    """All measurements, each in a new process."""
    few, many = max(1, count // 10), count
    cases: list[tuple[str, Callable[[Path], None], Path, int]] = []
    bases = []
    for number in range(BASES):
        bases.append(folder / f"{number}.jpg")
        photo(number).save(bases[-1], quality=90)
    for number in (few, many):
        jpegs = write_folder(folder / f"jpeg-{number}", bases, number)
        cases.append(("check, JPEG", checked, jpegs, number))
    cases.append(("reading, JPEG", read, jpegs, many))
    cases.append(
        ("reading, tar.gz of TIFF", read, write_tar_gz(folder / "large.tar.gz", bases), LARGE)
    )
    if heic is not None:
        cases.append(("check, HEIC", checked, copies(heic, folder / "heic", 20), 20))
    for what, work, dataset, number in cases:
        files = [dataset] if dataset.is_file() else list(dataset.iterdir())
        size = sum(file.stat().st_size for file in files) / 1e6
        yield Row(what, number, size, *in_a_process(measured, work, dataset))


HEAD = """\
| | images | MB | wall | processor | per image | own memory | with mapped files |
| --- | --- | --- | --- | --- | --- | --- | --- |"""


def line(row: Row) -> str:
    """As Markdown."""
    return (
        f"| {row.what} | {row.images:,} | {row.megabytes:,.0f} | {row.wall:.1f} s | "
        f"{row.processor:.1f} s | {1e3 * row.processor / row.images:.0f} ms | "
        f"{row.own:,.0f} MB | {row.peak:,.0f} MB |"
    )


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m lab.benchmarks.dataset", description=__doc__)
    parser.add_argument("--images", type=int, default=1000)
    parser.add_argument("--heic", type=Path, help="a photo in HEIC")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        print(f"{machine()}\n\n{HEAD}", flush=True)
        for row in rows(given.images, given.heic, Path(folder)):
            print(line(row), flush=True)


if __name__ == "__main__":
    main()
