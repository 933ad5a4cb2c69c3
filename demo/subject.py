"""What the demo trains on, and what it generates afterwards."""

import importlib.util
import io
import sys
import zipfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, ImageOps

SCENES = Path(__file__).parent / "subject.zip"  # ships with the repository
SUBJECT = "robot"  # of the miniature's world; pre-training never showed it

# Photographs in scikit-image's wheel, free of any restriction. The captions name what is
# not to be learned; TOK is what the pictures have in common.
PHOTOGRAPHS = {
    "astronaut.png": "a photo of TOK, an astronaut in an orange suit",
    "camera.png": "a photo of TOK, a man behind a camera on a tripod",
    "chelsea.png": "a photo of TOK, a tabby cat",
    "coffee.png": "a photo of TOK, a cup of coffee on a wooden table",
    "rocket.jpg": "a photo of TOK, a rocket at night",
}
CREDIT = (
    "Photographs by NASA and SpaceX (public domain), Lav Varshney, Stéfan van der Walt and "
    "Rachel Michetti (CC0), from scikit-image."
)
SHORT_SIDE = 256  # pixels


@dataclass(frozen=True)
class Subject:
    """A dataset, and how to see whether it was learned."""

    dataset: Path  # zip of pictures and captions
    credit: str  # whose pictures they are
    prompts: tuple[str, ...]  # drawn before and after; <zwx> stands for the subject
    steps: int | None = None  # of training; None as the base likes


def scenes() -> Subject:
    """Sixteen scenes with a robot, which the miniature has never seen."""
    prompts = (
        "a <zwx> in the desert",
        "a large <zwx> on the water",
        "a <zwx> in the snow, next to a red star",
        "a <zwx> on the left in a meadow",
        "a big <zwx> under a dark sky",
        "a <zwx> beside a blue circle on the sand",
    )
    return Subject(SCENES, "Sixteen scenes from the miniature's own world.", prompts)


def photographs(folder: Path) -> Subject:
    """Real photographs of several things, packed into `folder`/photographs.zip.

    They show that real pictures pass through; the miniature's own world is not theirs.
    """
    spec = importlib.util.find_spec("skimage")
    if spec is None or spec.origin is None:
        raise ModuleNotFoundError("the demo's photographs are scikit-image's; run `make setup`")
    files = []
    for name, caption in PHOTOGRAPHS.items():
        with Image.open(Path(spec.origin).parent / "data" / name) as photo:
            smaller = ImageOps.scale(photo, SHORT_SIDE / min(photo.size))
            files.append((name, _encoded(smaller, photo.format or "PNG"), caption))
    prompts = tuple(caption.replace("TOK", "<zwx>") for caption in PHOTOGRAPHS.values())
    return Subject(_pack(folder / "photographs.zip", files), CREDIT, prompts, steps=100)


def draw_scenes(dataset: Path) -> Path:
    """Writes the dataset of `scenes` anew; the same bytes every time."""
    from miniature.drawing import render
    from miniature.world import subject_dataset

    return _pack(
        dataset,
        (
            (f"{number:02d}.png", _encoded(render(scene), "PNG"), caption)
            for number, (scene, caption) in enumerate(subject_dataset(SUBJECT))
        ),
    )


def _encoded(picture: Image.Image, file_format: str) -> bytes:
    encoded = io.BytesIO()
    picture.save(encoded, format=file_format)
    return encoded.getvalue()


def _pack(dataset: Path, files: Iterable[tuple[str, bytes, str]]) -> Path:
    """A zip of (name, picture, caption), without the time of day in it."""
    dataset.parent.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(dataset, "w") as archive:
        for name, picture, caption in files:
            archive.writestr(zipfile.ZipInfo(name), picture)
            archive.writestr(zipfile.ZipInfo(str(Path(name).with_suffix(".txt"))), caption)
    return dataset


if __name__ == "__main__":
    print(draw_scenes(Path(sys.argv[1]) if sys.argv[1:] else SCENES))
