"""The preview images of a run, as files and as one contact sheet.

samples/step-000100/00.png   the first prompt after 100 steps; step-000000 is the base model;
                             00-1.png follows if a prompt has several images
samples/sheet.png            all of them: a row per step, a column per image; of pairs, first the
                             control images
"""

import logging
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from PIL import Image

from inference.request import ResolvedRequest
from trainer.events import Events
from trainer.monitor.contact_sheet import make_sheet, save_png, thumbnail
from trainer.run_files import GENERATED, PREVIEW, SAMPLES, SHEET, STEP, listed

log = logging.getLogger(__name__)

FOLDER = SAMPLES
CONTROL = "control"  # the label of the row of control images


class PreviewImages:
    """The preview images of one run.

    `thumbnails` contains small copies by step, one per column; `last` the newest images.
    """

    def __init__(
        self,
        output: Path,
        all_resolved: Sequence[ResolvedRequest],
        events: Events | None = None,
        controls: Sequence[Image.Image] = (),
    ) -> None:
        """controls: of pairs, what each prompt edits."""
        self.folder, self._events = output / FOLDER, events or Events()
        self._resolved = list(all_resolved)
        self.columns = [resolved.prompt for resolved in all_resolved for _ in resolved.seeds]
        small = [thumbnail(each) for each in controls]
        before = zip(small, self._resolved, strict=False)
        self._controls = [each for each, resolved in before for _ in resolved.seeds]
        self.thumbnails: dict[int, list[Image.Image]] = {}
        self.last: list[Image.Image] = []

    def begin(self, done: int) -> None:
        """Reads the previews up to step `done` that a resumed run has written.

        Those of later steps stay on disk until the run generates them again.
        """
        for step, files in _found(self.folder):
            if 0 < done and step <= done and len(files) == len(self.columns):
                with suppress(OSError):  # damaged, or not an image
                    self.thumbnails[step] = [thumbnail(Image.open(file)) for file in files]

    def add_generated(
        self, step: int, image: Image.Image, resolved: ResolvedRequest, scale: float, key: str
    ) -> None:
        """Writes an image that a command has asked for to `generated/`. scale: the LoRA's."""
        place = self.folder.parent / GENERATED
        numbers = [each.stem.rpartition("-")[2] for each in listed(place)]
        number = max((int(each) for each in numbers if each.isdecimal()), default=0) + 1
        file = save_png(image, place / f"step-{step:06d}-{number}.png")
        self._events.emit(
            "generated",
            step=step,
            id=key,
            prompt=resolved.prompt,
            negative_prompt=resolved.negative_prompt,
            seed=resolved.seeds[0],
            width=resolved.width,
            height=resolved.height,
            steps=resolved.steps,
            guidance_scale=resolved.guidance_scale,
            lora_scale=scale,
            file=f"{GENERATED}/{file.name}",
        )
        log.info("step %d: generated %r: %s", step, resolved.prompt, file)

    def add(self, step: int, images: Sequence[Sequence[Image.Image]]) -> None:
        """Writes the images of every prompt after a step, and updates the sheet."""
        folder = self.folder / f"step-{step:06d}"
        for number, (resolved, generated) in enumerate(zip(self._resolved, images, strict=True)):
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
            log.info("step %d: generated %r: %s", step, resolved.prompt, ", ".join(map(str, files)))
        self.last = [image for of_prompt in images for image in of_prompt]
        self.thumbnails[step] = [thumbnail(image) for image in self.last]
        rows = [(CONTROL, self._controls)] if self._controls else []
        rows += [(step_label(each), self.thumbnails[each]) for each in sorted(self.thumbnails)]
        save_png(make_sheet(rows, self.columns), self.folder / SHEET)


def step_label(step: int) -> str:
    """The label of a step's images."""
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
    """The numbers of prompt and image in a file's name."""
    return [int(part) for part in file.stem.split("-")]
