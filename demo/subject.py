"""The demo's datasets and prompts."""

import importlib.util
import io
import sys
import zipfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, ImageOps

SCENES = Path(__file__).parent / "subject.zip"  # ships with the repository
SUBJECT = "robot"  # not in the miniature's pre-training data

# Photos from scikit-image's wheel without licence restrictions. The captions describe what is not
# to be learned; TOK is what the images have in common.
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
    """A dataset, and prompts that show whether it was learned."""

    dataset: Path  # zip of images and captions
    credit: str  # author and licence of the images
    prompts: tuple[str, ...]  # for the images before and after; <zwx> is the subject
    steps: int | None = None  # training steps; None: the base model's default


def scenes() -> Subject:
    """Sixteen scenes with a robot, which is not in the miniature's pre-training data."""
    prompts = (
        "a <zwx> in the desert",
        "a large <zwx> on the water",
        "a <zwx> in the snow, next to a red star",
        "a <zwx> on the left in a meadow",
        "a big <zwx> under a dark sky",
        "a <zwx> beside a blue circle on the sand",
    )
    return Subject(SCENES, "Sixteen scenes of simple shapes, as the miniature knows.", prompts)


def photographs(folder: Path) -> Subject:
    """Photos of several subjects, packed into `folder`/photographs.zip.

    They test the code with real images. The miniature itself only knows simple shapes.
    """
    spec = importlib.util.find_spec("skimage")
    if spec is None or spec.origin is None:
        raise ModuleNotFoundError("--photographs needs scikit-image; run `make setup`")
    files = []
    for name, caption in PHOTOGRAPHS.items():
        with Image.open(Path(spec.origin).parent / "data" / name) as photo:
            smaller = ImageOps.scale(photo, SHORT_SIDE / min(photo.size))
            files.append((name, _encoded(smaller, photo.format or "PNG"), caption))
    prompts = tuple(caption.replace("TOK", "<zwx>") for caption in PHOTOGRAPHS.values())
    return Subject(_pack(folder / "photographs.zip", files), CREDIT, prompts, steps=100)


def draw_scenes(dataset: Path) -> Path:
    """Writes the dataset of `scenes`; the bytes are always the same."""
    from miniature.drawing import render
    from miniature.world import subject_dataset

    return _pack(
        dataset,
        (
            (f"{number:02d}.png", _encoded(render(scene), "PNG"), caption)
            for number, (scene, caption) in enumerate(subject_dataset(SUBJECT))
        ),
    )


def _encoded(image: Image.Image, file_format: str) -> bytes:
    encoded = io.BytesIO()
    image.save(encoded, format=file_format)
    return encoded.getvalue()


def _pack(dataset: Path, files: Iterable[tuple[str, bytes, str]]) -> Path:
    """Writes a zip of (name, image, caption) files, without timestamps."""
    dataset.parent.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(dataset, "w") as archive:
        for name, image, caption in files:
            archive.writestr(zipfile.ZipInfo(name), image)
            archive.writestr(zipfile.ZipInfo(str(Path(name).with_suffix(".txt"))), caption)
    return dataset


if __name__ == "__main__":
    print(draw_scenes(Path(sys.argv[1]) if sys.argv[1:] else SCENES))
