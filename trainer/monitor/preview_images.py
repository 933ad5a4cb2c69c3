"""The album: every picture that a training has drawn, as files and as one contact sheet.

samples/step-000100/00.png   the first prompt after 100 steps; step-000000 is the base before;
                             where a prompt is drawn several times, 00-1.png follows
samples/sheet.png            all of them at a glance: a row per step, a column per picture
"""

import logging
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from PIL import Image

from inference.request import ResolvedRequest
from trainer.events import Events
from trainer.monitor.contact_sheet import draw_sheet, save_png, thumbnail
from trainer.run_files import PREVIEW, SAMPLES, SHEET, STEP, listed

log = logging.getLogger(__name__)

FOLDER = SAMPLES


class PreviewImages:
    """The pictures of one training.

    `thumbnails` holds those of each step, small, one per column; `last` those of the last time.
    """

    def __init__(
        self, output: Path, all_resolved: Sequence[ResolvedRequest], events: Events | None = None
    ) -> None:
        self.folder, self._events = output / FOLDER, events or Events()
        self._drawings = list(all_resolved)
        self.columns = [resolved.prompt for resolved in all_resolved for _ in resolved.seeds]
        self.thumbnails: dict[int, list[Image.Image]] = {}
        self.last: list[Image.Image] = []

    def begin(self, done: int) -> None:
        """Takes over the previews up to step `done` that the resumed run has made here.

        Those of later steps stay on the disk until the run makes the same ones again.
        """
        for step, files in _found(self.folder):
            if 0 < done and step <= done and len(files) == len(self.columns):
                with suppress(OSError):  # damaged, or not an image
                    self.thumbnails[step] = [thumbnail(Image.open(file)) for file in files]

    def add(self, step: int, pictures: Sequence[Sequence[Image.Image]]) -> None:
        """Writes the pictures of every prompt after a step, and the sheet anew."""
        folder = self.folder / f"step-{step:06d}"
        for number, (resolved, generated) in enumerate(zip(self._drawings, pictures, strict=True)):
            names = [f"{number:02d}{f'-{k}' if k else ''}.png" for k in range(len(generated))]
            files = [
                save_png(each, folder / name) for each, name in zip(generated, names, strict=True)
            ]
            for file, seed in zip(files, resolved.seeds, strict=True):
                self._events.emit(
                    "preview",
                    step=step,
                    number=number,
                    prompt=resolved.prompt,
                    seed=seed,
                    file=f"{FOLDER}/{folder.name}/{file.name}",
                )
            log.info("step %d: drew %r: %s", step, resolved.prompt, ", ".join(map(str, files)))
        self.last = [picture for of_prompt in pictures for picture in of_prompt]
        self.thumbnails[step] = [thumbnail(picture) for picture in self.last]
        rows = [(step_label(each), self.thumbnails[each]) for each in sorted(self.thumbnails)]
        save_png(draw_sheet(rows, self.columns), self.folder / SHEET)


def step_label(step: int) -> str:
    """How the pictures of a step are called."""
    return "before" if step == 0 else f"{step:,}"


def _found(folder: Path) -> list[tuple[int, list[Path]]]:
    """The files of earlier previews, by step."""
    found = []
    for entry in listed(folder):
        match = STEP.fullmatch(entry.name)
        files = [file for file in listed(entry) if PREVIEW.fullmatch(file.name)]
        if match is not None and files:
            found.append((int(match[1]), sorted(files, key=_place)))
    return found


def _place(file: Path) -> list[int]:
    """Prompt and picture of a file's name."""
    return [int(part) for part in file.stem.split("-")]
