"""Reads a dataset: an archive or a folder of pictures and captions becomes checked examples.

Everything that can be wrong with it is found here, before any model is loaded, and reported
together. Archives come from strangers: `trainer.data.members` reads them, and the limits there and
below bound what a hostile one can cost. Knows nothing of buckets or latents.
"""

import io
import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from PIL import Image

from families.tokens import mentions, name_subject
from inference.image_decoding import IMAGE_FORMATS, upright_srgb
from inference.progress import Progress
from inference.prompts import foreign_syntax
from trainer.data.auxiliary_images import Group, auxiliary
from trainer.data.caption_files import (
    CaptionFile,
    captions_by_stem,
    one_line,
    read_caption,
    unread_captions,
)
from trainer.data.images import Checked, check, probe
from trainer.data.mapped_file import Content
from trainer.data.members import IMAGE_SUFFIXES, Unusable, listed, read_files, stem_of, suffix_of
from trainer.data.skipped_files import left_out
from trainer.data.threads import in_threads
from trainer.settings import TRIGGER_MARK

log = logging.getLogger(__name__)

MAX_TOTAL_PIXELS = 30_000_000_000  # 1,250 photos of 24 megapixels; minutes of decoding


class DatasetError(ValueError):
    """The dataset cannot be trained on. The message has one line per problem, all of them."""


@dataclass(frozen=True)
class Example:
    """One picture and its caption, checked."""

    name: str  # member name in the archive, printable; not a path to write to
    caption: str  # the subject's token is already in its place
    width: int  # pixels, upright
    height: int  # pixels, upright
    data: Content = field(repr=False)  # the encoded file as it lay in the archive
    caption_file: str = ""  # its name in the archive; empty where default_caption is used

    def image(self, at_least: tuple[int, int] | None = None) -> Image.Image:
        """The picture, upright, sRGB with 8 bits, alpha laid over white.

        A JPEG may come at a half, a quarter or an eighth of its size, as long as neither side falls
        below `at_least` (width and height, upright): much less is decoded then.
        """
        with Image.open(io.BytesIO(self.data), formats=IMAGE_FORMATS) as image:
            if at_least is not None:
                lies = image.size != (self.width, self.height)  # on its side
                image.draft(None, at_least[::-1] if lies else at_least)
            return upright_srgb(image)[0]


def read_dataset(
    archive: str | os.PathLike[str],
    default_caption: str,
    subject: str | None = None,
    prefix: str = "",
    suffix: str = "",
    skip_bad_images: bool = False,
) -> list[Example]:
    """The examples of a dataset, sorted by name.

    archive: a zip, tar or tar.gz file (told by its content, not its name) or a folder, flat or
        nested. Images are jpg, jpeg, png or webp; the caption of `a.jpg` is `a.txt` beside it.
        Masks, control images and the like are left out (`trainer.data.auxiliary_images`).
    default_caption: for images without a caption file, or with an empty one.
    subject: the placeholder token in zero-prior mode. The word TOK and the token itself stand for
        it in captions. None in baseline mode, where captions stay as written.
    prefix, suffix: put before and after every caption, as they are: a space between is theirs.
    skip_bad_images: leave out pictures that cannot be read or used, with a warning that counts
        them. Everything else that is wrong is still an error.

    Raises DatasetError that lists every problem, and NoRoom where the pictures cannot be put aside
    on disk. What does no harm is logged as a warning.
    """
    path = Path(os.path.abspath(archive))  # so that a folder given as . has a name
    problems: list[str] = []
    bad: list[str] = [] if skip_bad_images else problems  # one line per bad picture
    files = read_files(path, problems, bad)
    groups = auxiliary(files)
    besides = {name for group in groups if not group.used for name in group.names}
    images = {
        name: files[name]
        for name in sorted(files)
        if suffix_of(name) in IMAGE_SUFFIXES and name not in besides
    }
    if not images and not problems and not bad:
        problems += _why_empty(files, groups)
    captions = captions_by_stem(files, problems)

    checked = _check(images)
    read: dict[str, CaptionFile] = {}
    examples, animated, silent, unmanaged = [], [], [], []
    for name, data in images.items():
        caption_file = captions.get(stem_of(name), "")
        if caption_file and caption_file not in read:
            try:
                read[caption_file] = read_caption(caption_file, files[caption_file])
            except Unusable as error:
                problems.append(f"{caption_file}: {error}")
        caption = read[caption_file].text if caption_file in read else ""
        if not caption:
            caption, caption_file = one_line(default_caption), ""
        caption = one_line(f"{prefix}{caption}{suffix}")
        if subject is not None:
            caption = name_subject(caption, subject)
            if not mentions(caption, subject):
                silent.append(name)

        if name not in checked:
            problems.append(
                f"holds more than {MAX_TOTAL_PIXELS:,} pixels up to {name}; "
                "use fewer pictures or scale them down"
            )
            break
        found = checked[name]
        if isinstance(found, str):
            bad.append(f"{name}: {found}")
            if skip_bad_images and name in silent:
                silent.remove(name)
            continue
        if found.moves:
            animated.append(name)
        if found.bad_profile:
            unmanaged.append(name)
        examples.append(Example(name, caption, found.width, found.height, data, caption_file))

    if skip_bad_images and bad and not examples:
        problems += [*bad, "holds no picture that can be used", *map(str, groups)]
    captioned = len(examples) if skip_bad_images else len(images)
    if captioned and len(silent) == captioned:
        marked = any(TRIGGER_MARK in each.text for each in read.values())
        problems.append(
            f"none of the {captioned} captions mentions the subject; write TOK or {subject} "
            "where it belongs, in the caption files or in default_caption "
            "('a photo of TOK'), or train without a placeholder token"
            + ("; [trigger] in captions is plain text here" if marked else "")
        )
    if problems:
        # a.jpg and a.png share a.txt, whose problem is then found twice.
        lines = [f"{path.name}: {problem}" for problem in dict.fromkeys(problems)]
        raise DatasetError("\n".join(lines))

    if bad:
        log.warning(
            "%s: %d of %d pictures are skipped:\n%s",
            path.name,
            len(bad),
            len(bad) + len(examples),
            "\n".join(bad),
        )
    for group in groups:
        log.warning("%s: %s", path.name, group)
    rest = {name: data for name, data in files.items() if not _beside(name, groups)}
    for line in (*unread_captions(rest, captions_by_stem(rest, [])), *left_out(rest)):
        log.warning("%s: %s", path.name, line)
    _say_captions(path.name, examples, read, default_caption)
    written = {name: each.text for name, each in sorted(read.items())}
    written |= {"default_caption": default_caption, "caption_prefix": prefix}
    _say_foreign(path.name, written | {"caption_suffix": suffix}, subject)
    if unmanaged:
        log.warning(
            "%s: colour profiles that are broken are ignored: %s", path.name, listed(unmanaged)
        )
    if animated:
        log.warning("%s: only the first frame is used of: %s", path.name, listed(animated))
    if silent:
        log.warning(
            "%s: %d of %d captions do not mention the subject: %s",
            path.name,
            len(silent),
            len(examples),
            listed(silent),
        )
    return examples


def _why_empty(files: Mapping[str, Content], groups: Sequence[Group]) -> list[str]:
    """What a dataset holds that has no image to train on, a line each."""
    left = [group for group in groups if not group.used]
    if any(suffix_of(name) in IMAGE_SUFFIXES for group in left for name in group.names):
        lines = ["holds no image to train on; all that can be read look like something else"]
        return lines + [str(group) for group in left] + [*left_out(files)]
    return [
        f"holds no image that can be read ({listed(sorted(files)) or 'it is empty'}); "
        "put JPEG, PNG or WebP images in it",
        *left_out(files),
    ]


def _beside(name: str, groups: Sequence[Group]) -> bool:
    """Whether a file belongs to images that are left out."""
    return any(
        name in group.names or (group.folder and name.startswith(f"{group.folder}/"))
        for group in groups
        if not group.used
    )


def _say_captions(
    dataset: str,
    examples: Sequence[Example],
    read: Mapping[str, CaptionFile],
    default_caption: str,
) -> None:
    """Says how many images have a caption of their own, and what is odd about the captions."""
    default = [each.name for each in examples if not each.caption_file]
    use = f"{default_caption!r}" if default_caption.strip() else "no caption"
    own = f"{len(examples) - len(default)} with a caption of their own"
    names = f": {listed(default)}" if len(default) < len(examples) else ""
    rest = f", {len(default)} use {use}{names}" if default else ""
    log.info("%s: %d images: %s%s", dataset, len(examples), own, rest)
    empty = sorted(name for name, each in read.items() if not each.text)
    if empty:
        log.warning(
            "%s: empty caption files, for which %s is used: %s", dataset, use, listed(empty)
        )
    guessed = sorted(name for name, each in read.items() if each.guess and each.text)
    if guessed:
        log.warning(
            "%s: not UTF-8, read as %s; if this is not what was written, save as UTF-8: %s",
            *(dataset, read[guessed[0]].guess),
            listed([f"{name} ({read[name].text[:80]!r})" for name in guessed]),
        )


def _say_foreign(dataset: str, texts: Mapping[str, str], subject: str | None) -> None:
    """Names captions with syntax of other programs."""
    foreign = {
        name: found
        for name, text in texts.items()
        # [trigger] has a meaning where a trigger word is trained (`trainer.data.trigger`).
        if (found := [part for part in foreign_syntax(text) if subject or part != TRIGGER_MARK])
    }
    if foreign:
        log.warning(
            "%s: captions hold syntax of other programs, which is plain text here: %s",
            *(dataset, listed([f"{name} ({found[0]})" for name, found in foreign.items()])),
        )


def _check(images: dict[str, Content]) -> dict[str, Checked | str]:
    """What each picture is found to be, or why it cannot be used.

    Ends before the picture with which all together have too many pixels.
    """
    found: dict[str, Checked | str] = {}
    readable, pixels = [], 0
    for name, data in images.items():
        try:
            width, height = probe(bytes(data))
        except Unusable as error:
            found[name] = str(error)
            continue
        pixels += width * height
        if pixels > MAX_TOTAL_PIXELS:
            break
        readable.append(name)

    def checked(name: str) -> Checked | str:
        try:
            return check(bytes(images[name]))
        except Unusable as error:
            return str(error)  # not the error itself, which would hold on to the picture

    with Progress(total=len(readable), desc="reading images", unit="image") as progress:
        for name, result in zip(readable, in_threads(checked, readable), strict=True):
            found[name] = result
            progress.update()
    return found
