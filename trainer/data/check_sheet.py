"""The sheet of a dataset check: one HTML file with a card for each image, worst first.

It loads nothing and runs no script; its Content-Security-Policy enforces that. The template,
`templates/check.html`, escapes every value.
"""

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from adapters.files.atomic import atomic_file
from families.tokens import split_words
from trainer.data.checks import DatasetCheck, by_image
from trainer.data.example import Control, Example
from trainer.data.findings import Finding
from trainer.data.threads import in_threads
from trainer.templating import TEMPLATES

NAME = "check.html"
SIDE = 320  # pixels, longest side of an image on the sheet
MOST = 200  # images, so that a sheet has only a few megabytes
MOST_IN_GROUP = 24
PIXELATED = 128  # pixels; images up to this size are scaled without interpolation
_WORST = {"problem": 100, "warning": 10, "suggestion": 1}
TITLES = {
    "few-images": "Few images",
    "many-images": "Many images",
    "near-duplicates": "Nearly the same",
    "alike": "Alike",
    "same-background": "Same background",
    "blurred": "Blurred",
    "enlarged": "No fine detail",
    "small": "Small",
    "cropped": "Cropped",
    "no-token": "Without the token",
    "empty-captions": "Empty caption files",
    "encoding": "Encoding",
    "foreign-syntax": "Syntax of other programs",
    "no-caption": "Not a caption",
    "equal-captions": "Equal captions",
    "names-the-subject": "Same words in the captions",
    "class-word": "A word beside the token",
    "script": "Another script",
    "too-long": "Too long",
    "no-edit": "No edit",
    "other-ratio": "Another aspect ratio",
}
_GROUPS = ("near-duplicates", "alike")  # checks whose images are shown side by side
# Classes of report.css for the kinds of findings.
_STYLE = {"problem": "failed", "warning": "doubtful", "suggestion": "reported"}


@dataclass(frozen=True)
class Card:
    """An image on the sheet."""

    number: int  # for links
    data: dict[str, Any]  # `DatasetCheck.image_data`
    words: list[tuple[str, bool]]  # parts of the caption, and whether each is a token
    found: list[tuple[str, Finding]]  # by kind
    source: str  # a data URL
    width: int  # pixels, of the small image
    height: int
    controls: list[tuple[str, str]]  # name and data URL of each control image

    @property
    def frame(self) -> str:
        """The crop's place, as CSS; empty if (almost) all of the image is used."""
        if self.data["kept"] > 0.995:
            return ""
        width, height = self.data["width"], self.data["height"]
        left, top, right, bottom = self.data["crop"]
        return (
            f"left:{100 * left / width:.2f}%;top:{100 * top / height:.2f}%;"
            f"width:{100 * (right - left) / width:.2f}%;height:{100 * (bottom - top) / height:.2f}%"
        )


def write_sheet(check: DatasetCheck, path: Path) -> Path:
    """Writes the page atomically."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_file(path) as file:
        file.write(sheet(check).encode(errors="replace"))  # file names may not be valid Unicode
    return path


def sheet(check: DatasetCheck) -> str:
    """The page as HTML."""
    found = by_image(check)
    examples = sorted(
        check.findings.examples,
        key=lambda each: -sum(_WORST[kind] for kind, _ in found.get(each.name, ())),
    )
    shown = examples[:MOST]
    settings = check.settings
    word = settings.trigger_word
    words = settings.tokens or ((word,) if word else ())
    cards = {}
    for number, (example, image) in enumerate(
        zip(shown, in_threads(_small, shown), strict=True), start=1
    ):
        parts = [(part, part in words) for part in split_words(example.caption, words)]
        mine = found.get(example.name, [])
        data = check.image_data(example)
        before = [(each.name, _webp(_small(each))) for each in example.controls]
        cards[example.name] = Card(number, data, parts, mine, _webp(image), *image.size, before)
    groups = [
        (finding, [cards[name] for name in check.about(finding)[:MOST_IN_GROUP] if name in cards])
        for finding in (*check.warnings, *check.suggestions)
        if finding.check in _GROUPS
    ]
    own = sum(bool(each.caption_file) for each in examples)
    return TEMPLATES.get_template(NAME).render(
        check=check,
        cards=list(cards.values()),
        groups=[group for group in groups if len(group[1]) > 1],
        hidden=len(examples) - len(shown),
        own=own,
        marked=sum(bool(found.get(each.name)) for each in examples),
        general=_general(check),
        numbers={name: card.number for name, card in cards.items()},
        titles=TITLES,
        style=_STYLE,
        pixelated=PIXELATED,
    )


def _general(check: DatasetCheck) -> list[tuple[str, Finding, Sequence[str]]]:
    """Every finding with its kind and the images that it is about."""
    return [
        (kind, each, check.about(each))
        for kind, those in (
            ("problem", check.problems),
            ("warning", check.warnings),
            ("suggestion", check.suggestions),
        )
        for each in those
    ]


def _small(example: Example | Control) -> Image.Image:
    image = example.image((SIDE, SIDE)) if isinstance(example, Example) else example.image()
    image.thumbnail((SIDE, SIDE), Image.Resampling.LANCZOS, reducing_gap=2)
    return image


def _webp(image: Image.Image) -> str:
    """The image as a data URL."""
    encoded = io.BytesIO()
    image.save(encoded, "WEBP", quality=80, lossless=max(image.size) <= PIXELATED)
    return f"data:image/webp;base64,{base64.b64encode(encoded.getvalue()).decode()}"
