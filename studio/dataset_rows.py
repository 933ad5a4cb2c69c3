"""The images of a dataset as the page shows them, and the problems of the whole."""

import logging
from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from families.base import Base
from families.registry import editing
from families.tokens import SUBJECT, mentions
from inference.image_decoding import format_of, open_image, upright_size
from studio.dataset_files import (
    Files,
    caption_file,
    caption_version,
    contents_of,
    images_of,
    known_images,
    member_name,
    read_file,
    version_of,
)
from studio.folder import open_file
from trainer.captions import doubtful
from trainer.data import (
    CAPTION_SUFFIXES,
    Checked,
    Example,
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


@dataclass(frozen=True)
class Wanted:
    """What a dataset is shown for."""

    token: str | None = TOKEN  # None: without a placeholder token
    base: Base | None = None
    resolution: int | None = None  # pixels; None: without buckets
    controls: Sequence[str] = ()  # folders of control images, in the dataset
    default_caption: str = DEFAULT_CAPTION

    @property
    def size(self) -> tuple[int, int] | None:
        """Resolution and `Base.size_multiple`, for buckets."""
        multiple = self.base.size_multiple if self.base else MULTIPLE
        return (self.resolution, multiple) if self.resolution else None


def described(
    root: Path, files: Files, texts: dict[str, bytes], wanted: Wanted
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """The rows of all images, and the problems of the dataset.

    Control images of a training image are named in its row, and have rows with `is_control`.
    """
    size = wanted.size
    images, known = images_of(root, files), known_images(root)
    checked = {
        name: known.get(version_of(name, facts)) or _from_header(root, name)
        for name, facts in images.items()
    }
    contents = contents_of(root, files, texts)
    real = {member_name(name, wanted.controls): name for name in files}

    def check_images(names: Collection[str]) -> dict[str, Checked | str]:
        found = {member: checked[name] for member, name in real.items() if name in checked}
        # Images by their content, which the page does not show.
        return found | {name: _from_header(root, real[name]) for name in names if name not in found}

    # Masks and regularization images as training uses them by default; a new run checks masks.
    found = examine(
        {member: contents[name] for member, name in real.items()},
        wanted.default_caption,
        wanted.token,
        masks="auto",
        controls=wanted.base.reference_counts if wanted.base else (0, 0),
        most_regularization=MOST_REGULARIZATION,
        check_images=check_images,
        check_masks=False,
    )
    before = {
        real[target]: [real[each] for each in names] for target, names in found.pairs.of.items()
    }
    aside = {real[each] for each in found.pairs.controls}  # not trained on
    targets: dict[str, list[str]] = {}  # of images that are shown beside them only
    for target, names in before.items():
        for name in aside.intersection(names):
            targets.setdefault(name, []).append(target)
    warnings = [each for each in found.warnings if each.level >= logging.WARNING]
    if before and wanted.base and not wanted.base.most_references:
        warnings = [each for each in warnings if targets.keys().isdisjoint(each.names)]
        warnings.insert(0, _not_used(len(before), wanted.base))
    all_found = [("problem", each) for each in found.problems]
    all_found += [("warning", each) for each in warnings]
    words = (wanted.token,) if wanted.token else ()
    examples = [_with_content(each, root, files, real) for each in found.examples]
    purpose = Purpose(words, *(size or (None, MULTIPLE)))
    all_found += [
        ("warning" if each.level >= logging.WARNING else "suggestion", each)
        for each in check_examples(examples, purpose)
    ]
    texts_read = {name: each.text for name, each in found.captions.items()}
    doubts = doubtful(root, texts_read).items()
    all_found += [("warning", Finding(text, (name,))) for name, text in doubts]
    all_found = [
        (kind, replace(each, names=tuple(real.get(name, name) for name in each.names)))
        for kind, each in all_found
    ]
    marks, problems = _beside(all_found, list(images), targets)

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
        bucket = _bucket(width, height, *size) if size and width and name not in targets else None
        rows.append(
            {
                "name": name,
                "width": width,
                "height": height,
                "bytes": facts.st_size,
                "version": version_of(name, facts),
                "caption": wanted.default_caption if default else shown,
                "caption_version": caption_version(text),
                "caption_source": source,
                "default_caption": default,
                "marks": marks[name],
                "bucket": bucket,
                "trained": name in captions,
                "controls": before.get(name, []),
                "is_control": name in targets,
            }
        )
    return rows, problems


def _with_content(example: Example, root: Path, files: Files, real: Mapping[str, str]) -> Example:
    """The example; of a pair whose files may be equal, with their content."""
    size = files[real[example.name]].st_size
    if all(files[real[each.name]].st_size != size for each in example.controls):
        return example

    def content(name: str) -> bytes:
        return read_file(root, real[name], size + 1)

    controls = [replace(each, data=content(each.name)) for each in example.controls]
    return replace(example, data=content(example.name), controls=tuple(controls))


def _not_used(count: int, base: Base) -> Finding:
    return Finding(
        f"{count} image{'s have' if count != 1 else ' has'} control images, which {base.name} does "
        f"not use: to train on pairs, choose one of {', '.join(editing())} as base model in Train"
    )


def _beside(
    findings: list[tuple[str, Finding]], images: list[str], targets: Mapping[str, list[str]]
) -> tuple[dict[str, list[dict[str, str]]], list[dict[str, Any]]]:
    """Marks by image, and the problems of the whole; each with the images of its captions.

    A suggestion is about the whole: images with one background have no mark each. targets: the
    training images of a control image, which have its marks.
    """
    by_stem = defaultdict(list)
    for name in images:
        by_stem[stem_of(name)].append(name)
    known, marks = set(images), defaultdict[str, list[dict[str, str]]](list)
    problems: list[dict[str, Any]] = []
    for kind, finding in findings:
        about = list[tuple[str, str]]()  # images, and the name before the text
        for name in finding.names:
            if name in targets:
                about += [(target, f"{name}: ") for target in targets[name]]
            else:
                own = [name] if name in known else by_stem[stem_of(name)] * _is_text(name)
                about += [(image, "") for image in own]
        for image, about_it in dict.fromkeys(about if kind != "suggestion" else ()):
            text = f"{about_it}{finding.beside or finding.text}"
            marks[image].append({"kind": kind, "text": text})
        if not about or kind != "warning":
            image_of_it = about[0][0] if about and kind == "problem" else None
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


def _is_text(name: str) -> bool:
    return suffix_of(name) in CAPTION_SUFFIXES


def _text_of(content: bytes) -> str:
    try:
        return decode(content)[0]
    except Unusable:
        return content.decode(errors="replace")  # `examine` says what is wrong
