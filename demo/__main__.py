"""python -m demo: trains on a few pictures, and draws before and after.

The pictures are scenes of the miniature's own world; with `--photographs` they are real ones.
"""

import os
import shutil
import sys
import time
from pathlib import Path

import torch
from PIL import Image

from demo.grid import Row, draw_grid
from demo.subject import Subject, photographs, scenes
from predict import Predictor
from train import train
from trainer.dataset import read_dataset

OUTPUTS = Path("outputs")
SEED = 1
PREVIEWED, PREVIEW_EVERY = 3, 100  # prompts in the report, and the steps between their pictures


def main() -> None:
    start = time.perf_counter()
    # For models this small, sharing the work out costs more than it brings.
    torch.set_num_threads(1)
    os.environ["BASE_MODEL"] = "miniature-turbo"  # on a GPU too
    subject = photographs(OUTPUTS) if "--photographs" in sys.argv[1:] else scenes()
    _say(f"The pictures: {subject.dataset}", subject.credit)

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
    before = _draw(predictor, subject, OUTPUTS / "before", None)
    after = _draw(predictor, subject, OUTPUTS / "after", weights)

    picture = OUTPUTS / "demo.png"
    draw_grid(_rows(subject, before, after)).save(picture)
    _say(
        f"Done in {time.perf_counter() - start:.0f} seconds.",
        f"{picture}: the pictures, before and after, at a glance",
        f"{OUTPUTS / 'report.html'}: how the training went and how it was judged, on one page",
        f"{weights}: the LoRA and the new word, to predict with",
        f"{OUTPUTS / 'before'}, {OUTPUTS / 'after'}: every picture by itself",
    )


def _draw(predictor: Predictor, subject: Subject, folder: Path, weights: Path | None) -> list[Path]:
    """One picture of every prompt, as files in the folder."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    files = []
    for number, prompt in enumerate(subject.prompts):
        drawn = predictor.predict(
            prompt=prompt,
            replicate_weights=str(weights) if weights else None,
            seed=SEED + number,
            output_format="png",
        )
        files.append(Path(shutil.move(drawn[0], folder / f"{number}.png")))
    return files


def _rows(subject: Subject, before: list[Path], after: list[Path]) -> list[Row]:
    """The grid's rows: as many training pictures as prompts, then the prompts twice."""
    shown = read_dataset(subject.dataset, "")[: len(subject.prompts)]

    def drawn(files: list[Path]) -> list[tuple[Image.Image, str]]:
        return list(zip(map(Image.open, files), subject.prompts, strict=True))

    return [
        Row("Trained on", [(example.image(), example.caption) for example in shown]),
        Row("Before", drawn(before)),
        Row("After", drawn(after)),
    ]


def _say(*lines: str) -> None:
    """A paragraph among the log lines of what the demo calls."""
    print("", *lines, "", sep="\n", flush=True)


if __name__ == "__main__":
    main()
