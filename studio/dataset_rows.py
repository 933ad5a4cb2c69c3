"""The images of a dataset as the page shows them, and the problems of the whole."""

import logging
from collections import defaultdict
from collections.abc import Collection
from pathlib import Path
from typing import Any

from families.tokens import SUBJECT, mentions
from inference.image_decoding import format_of, open_image, upright_size
from studio.dataset_files import (
    Files,
    caption_file,
    caption_version,
    images_of,
    known_images,
    read_file,
    version_of,
)
from studio.folder import open_file
from trainer.captions import doubtful
from trainer.data import (
    CAPTION_SUFFIXES,
    HEAD_BYTES,
    IMAGE_SUFFIXES,
    Checked,
    Finding,
    Purpose,
    Unusable,
    check_examples,
    cover,
    crop,
    examine,
    nearest_bucket,
    probe,
    stem_of,
    suffix_of,
)
from trainer.encodings import decode
from trainer.settings import MOST_REGULARIZATION, TrainingInputs

DEFAULT_CAPTION: str = TrainingInputs.model_fields["default_caption"].default
TOKEN: str = TrainingInputs.model_fields["placeholder_token"].default
MULTIPLE = 16  # `Base.size_multiple` where no base model is named


def names_subject(text: str) -> bool:
    """Whether the name of a folder is a caption, where the token is not known."""
    return mentions(text, SUBJECT) or mentions(text, TOKEN)


def described(
    root: Path, files: Files, texts: dict[str, bytes], token: str, size: tuple[int, int] | None
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """The rows of all images, and the problems of the dataset.

    size: resolution and the base's `size_multiple`, for buckets; or None.
    """
    images, known = images_of(root, files), known_images(root)
    checked = {
        name: known.get(version_of(name, facts)) or _from_header(root, name)
        for name, facts in images.items()
    }
    contents = {n: texts[n] if n in texts else _head(root, n) for n in files}

    def check_images(names: Collection[str]) -> dict[str, Checked | str]:
        others = {name: _from_header(root, name) for name in names if name not in checked}
        return checked | others  # images by their content, which the page does not show

    # Masks and regularization images as training uses them by default; a new run checks masks.
    found = examine(
        contents,
        DEFAULT_CAPTION,
        token,
        masks="auto",
        most_regularization=MOST_REGULARIZATION,
        check_images=check_images,
        check_masks=False,
    )
    all_found = [("problem", each) for each in found.problems]
    all_found += [("warning", each) for each in found.warnings if each.level >= logging.WARNING]
    purpose = Purpose((token,), *(size or (None, MULTIPLE)))
    all_found += [
        ("warning" if each.level >= logging.WARNING else "suggestion", each)
        for each in check_examples(found.examples, purpose)
    ]
    texts_read = {name: each.text for name, each in found.captions.items()}
    doubts = doubtful(root, texts_read).items()
    all_found += [("warning", Finding(text, (name,))) for name, text in doubts]
    marks, problems = _beside(all_found, list(images))

    captions = {each.name: each for each in found.examples}
    rows = []
    for name, facts in images.items():
        file = caption_file(name, files)
        text = texts.get(file)
        shown, source = "" if text is None else _text_of(text), None
        if not shown.strip() and (other := found.captions.get(name)) and other.file != file:
            shown, source = other.text, other.file or None  # of another file, a table or a folder
        default = not shown.strip()
        used = checked[name]
        width, height = (0, 0) if isinstance(used, str) else (used.width, used.height)
        bucket = _bucket(width, height, *size) if size and width else None
        rows.append(
            {
                "name": name,
                "width": width,
                "height": height,
                "bytes": facts.st_size,
                "version": version_of(name, facts),
                "caption": DEFAULT_CAPTION if default else shown,
                "caption_version": caption_version(text),
                "caption_source": source,
                "default_caption": default,
                "marks": marks[name],
                "bucket": bucket,
                "trained": name in captions,
            }
        )
    return rows, problems


def _beside(
    findings: list[tuple[str, Finding]], images: list[str]
) -> tuple[dict[str, list[dict[str, str]]], list[dict[str, Any]]]:
    """Marks by image, and the problems of the whole; each with the images of its captions.

    A suggestion is about the whole: images with one background have no mark each.
    """
    by_stem = defaultdict(list)
    for name in images:
        by_stem[stem_of(name)].append(name)
    known, marks = set(images), defaultdict[str, list[dict[str, str]]](list)
    problems: list[dict[str, Any]] = []
    for kind, finding in findings:
        about = [
            image
            for name in finding.names
            for image in ([name] if name in known else by_stem[stem_of(name)] * _is_text(name))
        ]
        for image in dict.fromkeys(about if kind != "suggestion" else ()):
            marks[image].append({"kind": kind, "text": finding.beside or finding.text})
        if not about or kind != "warning":
            image_of_it = about[0] if about and kind == "problem" else None
            problems.append({"kind": kind, "text": finding.text, "image": image_of_it})
    return marks, problems


def _bucket(width: int, height: int, resolution: int, multiple: int) -> dict[str, Any]:
    bucket = nearest_bucket(width, height, resolution, multiple)
    left, top, right, bottom = box = crop(width, height, bucket)
    return {
        "width": bucket.width,
        "height": bucket.height,
        "crop": [round(each) for each in box],
        "cut": round(1 - (right - left) * (bottom - top) / (width * height), 4),
        "upscaled": round(max(1.0, cover(width, height, bucket)), 3),
    }


def _from_header(root: Path, name: str) -> Checked | str:
    """Size of an image that was not decoded yet."""
    try:
        with open(open_file(root, name.split("/")), "rb") as file:
            head = file.read(1 << 18)
            # In these formats, sizes and EXIF are at the beginning; others are opened as a whole.
            if format_of(head) not in ("JPEG", "PNG"):
                head += file.read()
            probe(head)
            with open_image(head) as image:
                return Checked(*upright_size(image), False, False)
    except Exception as error:  # Pillow may raise any exception on malformed images
        return str(error)


def _head(root: Path, name: str) -> bytes:
    """The bytes by which the trainer knows the kind of a file; of an image its suffix suffices."""
    return b"" if suffix_of(name) in IMAGE_SUFFIXES else read_file(root, name, HEAD_BYTES)


def _is_text(name: str) -> bool:
    return suffix_of(name) in CAPTION_SUFFIXES


def _text_of(content: bytes) -> str:
    try:
        return decode(content)[0]
    except Unusable:
        return content.decode(errors="replace")  # `examine` says what is wrong
