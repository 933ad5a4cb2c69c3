"""Photographs as the study's ground: a published base, and CLIP and LPIPS for a judge.

A folder holds one folder of images per subject, named by its class word and a name of its own:
`dog-rex`, `old_man-pablo`.
"""

import gc
import itertools
import shutil
import tempfile
import zlib
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageOps

from adapters.archive import Archive, read_archive
from adapters.placeholder import Placeholder
from families.loading import load_family
from families.registry import find_base_or_folder
from inference.engine import Engine
from inference.image_decoding import open_image, upright_srgb
from inference.request import Request
from lab.experiments import measures
from lab.experiments.clip import Clip, has_lpips, lpips
from lab.experiments.zero_prior.design import CONDITIONS, PLACEHOLDER, Condition, Size
from lab.experiments.zero_prior.study import Run
from trainer.data.members import IMAGE_SUFFIXES
from trainer.run import train
from trainer.settings.fields import resolve
from trainer.settings.inputs import TrainingInputs

TEMPLATES = (
    "{}",
    "a photo of {}",
    "a close-up photo of {}",
    "a picture of {}",
    "an image of {}",
    "a portrait of {}",
    "a snapshot of {}",
    "a detailed photo of {}",
    "a cropped photo of {}",
    "a photo that shows {}",
)
SCENES = (
    "a photo of {} on a beach",
    "a photo of {} in the snow",
    "a photo of {} in front of a brick wall",
    "an oil painting of {}",
    "a photo of {} next to a red bicycle",
    "a pencil drawing of {}",
    "a photo of {} in a forest, in fog",
    "a photo of {} at night under neon lights",
)
FREE = (
    "a bowl of fruit on a wooden table",
    "a lighthouse on a cliff in a storm",
    "a street in a small town at noon",
    "an open book beside a cup of coffee",
    "a yellow tram on a bridge",
    "a watercolour of a mountain lake",
    "a field of sunflowers under a blue sky",
    "a spaceship over a desert planet",
)
WRONG_PRIOR = "sks"  # a rifle, which made many a DreamBooth subject carry arms
FIRST_SEED = 50_000  # of the noise
SHOWN_SIZE = (256, 256)  # pixels of what is kept


def subjects_of(folder: Path) -> tuple[str, ...]:
    """The subjects' folders. Raises ValueError where there is none, or one without a class."""
    found = sorted(each.name for each in folder.iterdir() if each.is_dir())
    if not found:
        raise ValueError(f"{folder} holds no folder of pictures; make one per subject")
    for name in found:
        if not all(name.partition("-")[::2]):
            raise ValueError(f"{folder / name}: name the folder CLASS-NAME, such as dog-rex")
    return tuple(found)


def class_of(subject: str) -> str:
    """`an old man` for `old_man-pablo`: what would be said of one that has no name."""
    word = subject.partition("-")[0].replace("_", " ")
    return f"{'an' if word[0] in 'aeiou' else 'a'} {word}"


class Photographs:
    """Subjects in images that somebody took."""

    conditions: Sequence[Condition] = tuple(
        replace(each, word=WRONG_PRIOR) if each.name == "wrong_prior" else each
        for each in CONDITIONS
    )

    def __init__(self, folder: Path, base: str, size: Size) -> None:
        self.folder, self.base_model, self.base = folder, base, find_base_or_folder(base)
        choices = tuple(each for each in size.choices if not each.recipe)  # what `train` can do
        self.size = replace(size, subjects=subjects_of(folder), choices=choices)
        self.clip = Clip()
        width = load_family(self.base).text_width
        self.blank = Archive({}, (Placeholder.create(PLACEHOLDER, width, 1e-5, 0).detached(),), {})
        self._engine: Engine | None = None
        self._before: dict[tuple[str, ...], list[Image.Image]] = {}  # by prompts

    def train(self, run: Run) -> Archive:
        word = run.condition.word_for(class_of(run.subject))
        self._engine = None  # the training needs the memory
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        with tempfile.TemporaryDirectory() as folder:
            settings = resolve(
                TrainingInputs(
                    dataset=self._dataset(run.subject, word, Path(folder) / "dataset"),
                    base_model=self.base_model,
                    placeholder_token=PLACEHOLDER,
                    train_placeholder_token=run.condition.zero_prior,
                    seed=run.seed,
                    validation_every=0,
                    preserve="off",
                    output_dir=Path(folder),
                    **run.point.settings,
                )
            )
            return read_archive(train(settings))

    def measure(
        self, run: Run, archive: Archive | None
    ) -> tuple[list[Image.Image], dict[str, Any]]:
        size, class_word = self.size, class_of(run.subject)
        word = run.condition.word_for(class_word)
        laid = archive or self.blank

        scenes = _cycled(SCENES, size.subject_prompts)
        prompts = [scene.format(word) for scene in scenes]
        pictures = self._draw(prompts, laid)
        seen, own = self.clip.images(pictures), self.clip.images(self._photographs(run.subject))
        old = self.clip.images(self._untrained(prompts))
        # What CLIP is asked about is the class word: it has never heard the others.
        meant = self.clip.texts([scene.format(class_word) for scene in scenes])
        scores: dict[str, Any] = {
            "likeness": (seen @ own.T).mean(dim=1).tolist(),
            "text": (seen * meant).sum(dim=1).tolist(),
            "old_look": (seen * old).sum(dim=1).tolist(),
            "innocent": (own @ old.T).mean(dim=0).tolist(),
            "sharpness": measures.sharpness(pictures),
        } | measures.tones(pictures)

        free = _cycled(FREE, size.free_prompts)
        before, after = self._untrained(free), self._draw(free, laid)
        scores["free_text"] = (self.clip.images(after) * self.clip.texts(free)).sum(dim=1).tolist()
        scores["free_apart"] = self._apart(after, before)

        classes = [scene.format(class_word) for scene in _cycled(SCENES, size.class_prompts)]
        bled = self.clip.images(self._draw(classes, laid))
        scores["class_likeness"] = (bled @ own.T).mean(dim=1).tolist()
        scores["class_text"] = (bled * self.clip.texts(classes)).sum(dim=1).tolist()

        repeated = self._draw([f"a photo of {word}"] * size.repeats, laid)
        pairs = list(itertools.combinations(repeated, 2))
        scores["apart"] = self._apart([one for one, _ in pairs], [other for _, other in pairs])
        scores["apart_by"] = "LPIPS" if has_lpips() else "CLIP"
        if archive is not None and archive.placeholder is not None:
            scores["placeholder_norm"] = archive.placeholder.norm()
        return [ImageOps.contain(each, SHOWN_SIZE) for each in pictures], scores

    def _draw(self, prompts: Sequence[str], archive: Archive) -> list[Image.Image]:
        engine = self._engine = self._engine or Engine()
        pixels, steps = self.size.pixels, self.size.steps
        size: dict[str, Any] = {"width": pixels, "height": pixels, "num_inference_steps": steps}
        size["apply_lora"] = "always"  # also where it changes other prompts
        requests = [
            Request(prompt=text, seed=FIRST_SEED + number, **size)
            for number, text in enumerate(prompts)
        ]
        return [engine.generate(each, archive, self.base.name)[0] for each in requests]

    def _untrained(self, prompts: Sequence[str]) -> list[Image.Image]:
        """What the untrained base draws for them."""
        key = tuple(prompts)
        if key not in self._before:
            self._before[key] = self._draw(prompts, self.blank)
        return self._before[key]

    def _apart(self, some: list[Image.Image], others: list[Image.Image]) -> list[float]:
        """Distance of each image to its partner: LPIPS where it is installed, else by CLIP."""
        if has_lpips():
            return lpips(some, others)
        return (self.clip.images(some) - self.clip.images(others)).norm(dim=1).tolist()

    def _files(self, subject: str) -> list[Path]:
        files = sorted((self.folder / subject).iterdir())
        return [file for file in files if file.suffix.lower() in IMAGE_SUFFIXES]

    def _photographs(self, subject: str) -> list[Image.Image]:
        pictures = []
        for file in self._files(subject):
            with open_image(file.read_bytes()) as picture:
                pictures.append(upright_srgb(picture)[0])
        return pictures

    def _dataset(self, subject: str, word: str, folder: Path) -> Path:
        folder.mkdir()
        for file in self._files(subject):
            template = TEMPLATES[zlib.crc32(f"{subject}/{file.name}".encode()) % len(TEMPLATES)]
            shutil.copy(file, folder)
            (folder / file.name).with_suffix(".txt").write_text(template.format(word) + "\n")
        return folder


def _cycled(texts: Sequence[str], count: int) -> list[str]:
    return list(itertools.islice(itertools.cycle(texts), count))
