"""python -m demo: trains a LoRA on a few images, and generates before and after.

The images are scenes of simple shapes, as the miniature knows; with `--photographs`, real photos.
"""

import argparse
import logging
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from inference.console import log_to_console, one_message
from inference.flags import typed

if TYPE_CHECKING:
    from demo.grid import Row
    from demo.subject import Subject
    from predict import Predictor

OUTPUTS = Path("outputs")
SEED = 1
PREVIEWED, PREVIEW_EVERY = 3, 100  # prompts in the report, and the steps between their images
SHOWN = ("inference.progress",)  # whose log lines are shown: training steps without a terminal


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the demo with the arguments (default: `sys.argv`)."""
    start = time.perf_counter()
    parser = argparse.ArgumentParser(
        prog="zeroprior demo",
        description="Train a LoRA of a toy robot with the miniature test model, then generate it. "
        "CPU only, about 2 minutes.",
    )
    parser.add_argument("--photographs", action="store_true", help="train on real photos")
    parser.add_argument("--verbose", action="store_true", help="show the whole log")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    given = parser.parse_args(arguments)
    print(
        "demo: trains a LoRA on a few images with the miniature test model, then generates with "
        f"it; output in a new folder in {OUTPUTS}/",
        "loading libraries …",
        sep="\n",
        flush=True,
    )
    log_to_console(debug=given.debug)
    with one_message(given.debug), tempfile.TemporaryDirectory() as folder:
        import torch

        from demo.subject import photographs, scenes

        # For models this small, several threads are slower than one.
        torch.set_num_threads(1)
        os.environ["BASE_MODEL"] = "miniature-turbo"  # on a GPU too
        subject = photographs(Path(folder)) if given.photographs else scenes()
        if given.verbose:
            _show(subject, start)
        else:
            with _few_lines():
                _show(subject, start)


@contextmanager
def _few_lines() -> Iterator[None]:
    """Hides log records below an error on the console; they are in the run's log.txt."""

    def shown(record: logging.LogRecord) -> bool:
        return record.levelno >= logging.ERROR or record.name in SHOWN

    handlers = [*logging.root.handlers]
    for handler in handlers:
        if getattr(handler, "stream", None) is sys.stdout:
            handler.addFilter(shown)
    try:
        yield
    finally:
        for handler in handlers:
            handler.removeFilter(shown)


def _show(subject: "Subject", start: float) -> None:
    # The model libraries take seconds to import.
    from demo.grid import draw_grid
    from predict import Predictor
    from trainer.data import read_dataset
    from trainer.run import train_and_check
    from trainer.settings import TrainingInputs, resolve

    settings = resolve(
        TrainingInputs(
            dataset=subject.dataset,
            steps=subject.steps,
            seed=SEED,
            sample_prompts="\n".join(subject.prompts[:PREVIEWED]),
            sample_every=PREVIEW_EVERY,
        )
    )
    count = len(read_dataset(subject.dataset, ""))
    steps = settings.for_images(count).steps
    _say(
        "",
        f"  images      {subject.dataset.name}, {count}: {subject.credit}",
        f"  base model  {settings.base.name}, included",
        f"  token       {settings.subject}",
        f"  settings    {steps} steps of {settings.batch_size}, rank {settings.rank}, seed {SEED}",
        "",
    )
    result = train_and_check(settings)
    weights = result.weights

    _say(f"generating {2 * len(subject.prompts)} images, before and after …")
    predictor = Predictor()
    predictor.setup()
    run = weights.parent  # a new folder, so nothing is overwritten
    before = _generate(predictor, subject, run / "before", None)
    after = _generate(predictor, subject, run / "after", weights)

    image = OUTPUTS / "demo.png"
    draw_grid(_rows(subject, before, after)).save(image)
    _say(
        "",
        f"result {result.verdict}",
        f"done in {time.perf_counter() - start:.0f} s; results in {run}",
        f"  {image}: training images, before and after",
        "  report.html: losses, preview images, checks",
        "  weights.zip: LoRA and token",
        "  before/, after/: single images",
        "  log.txt: the whole log",
        "",
        f'next: {typed()["generate"]} --weights {weights} --prompt "{subject.prompts[0]}"',
    )


def _generate(
    predictor: "Predictor", subject: "Subject", folder: Path, weights: Path | None
) -> list[Path]:
    """One image per prompt, saved in the folder."""
    folder.mkdir()
    files = []
    for number, prompt in enumerate(subject.prompts):
        generated = predictor.predict(
            prompt=prompt,
            replicate_weights=str(weights) if weights else None,
            seed=SEED + number,
            output_format="png",
        )
        files.append(Path(shutil.move(generated[0], folder / f"{number}.png")))
    return files


def _rows(subject: "Subject", before: list[Path], after: list[Path]) -> list["Row"]:
    """The rows of the grid: training images, images before and after training."""
    from PIL import Image

    from demo.grid import Row
    from trainer.data import read_dataset

    shown = read_dataset(subject.dataset, "")[: len(subject.prompts)]

    def generated(files: list[Path]) -> list[tuple[Image.Image, str]]:
        return list(zip(map(Image.open, files), subject.prompts, strict=True))

    return [
        Row("Trained on", [(example.image(), example.caption) for example in shown]),
        Row("Before", generated(before)),
        Row("After", generated(after)),
    ]


def _say(*lines: str) -> None:
    print(*lines, sep="\n", flush=True)


if __name__ == "__main__":
    main()
