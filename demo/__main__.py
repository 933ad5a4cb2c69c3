"""python -m demo: trains on a few pictures, and draws before and after.

The pictures are scenes of the miniature's own world; with `--photographs` they are real ones.
"""

import os
import shutil
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING

from PIL import Image

from demo.grid import Row, draw_grid
from demo.subject import Subject, photographs, scenes
from inference.console import begin

if TYPE_CHECKING:
    from predict import Predictor

OUTPUTS = Path("outputs")
SEED = 1
PREVIEWED, PREVIEW_EVERY = 3, 100  # prompts in the report, and the steps between their pictures


def main() -> None:
    start = time.perf_counter()
    begin(
        "demo: trains a LoRA on a few images with the miniature test model, then generates with "
        f"it; output in a new folder in {OUTPUTS}/"
    )
    import torch

    # For models this small, sharing the work out costs more than it brings.
    torch.set_num_threads(1)
    os.environ["BASE_MODEL"] = "miniature-turbo"  # on a GPU too
    with tempfile.TemporaryDirectory() as folder:
        wanted = "--photographs" in sys.argv[1:]
        _show(photographs(Path(folder)) if wanted else scenes(), start)


def _show(subject: Subject, start: float) -> None:
    # The libraries of the models take seconds to import.
    from predict import Predictor
    from train import train

    _say(f"The training images: {subject.dataset}", subject.credit)

    _say("Training a LoRA and the new word <zwx>")
    weights = train(
        dataset=subject.dataset,
        steps=subject.steps,
        seed=SEED,
        sample_prompts="\n".join(subject.prompts[:PREVIEWED]),
        sample_every=PREVIEW_EVERY,
    ).weights

    _say("Drawing the same prompts before and after")
    predictor = Predictor()
    predictor.setup()
    run = weights.parent  # a new folder, in which nothing is overwritten
    before = _draw(predictor, subject, run / "before", None)
    after = _draw(predictor, subject, run / "after", weights)

    picture = OUTPUTS / "demo.png"
    draw_grid(_rows(subject, before, after)).save(picture)
    _say(
        f"Done in {time.perf_counter() - start:.0f} seconds.",
        f"{picture}: the pictures, before and after, at a glance",
        f"{run / 'report.html'}: how the training went and how it was judged, on one page",
        f"{weights}: the LoRA and the new word, to predict with",
        f"{run / 'before'}, {run / 'after'}: every picture by itself",
    )


def _draw(
    predictor: "Predictor", subject: Subject, folder: Path, weights: Path | None
) -> list[Path]:
    """One picture of every prompt, as files in the folder."""
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


def _rows(subject: Subject, before: list[Path], after: list[Path]) -> list[Row]:
    """The grid's rows: as many training pictures as prompts, then the prompts twice."""
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
    """A paragraph among the log lines of what the demo calls."""
    print("", *lines, "", sep="\n", flush=True)


if __name__ == "__main__":
    main()
