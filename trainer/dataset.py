"""Reads a dataset: an archive or a folder of pictures and captions becomes checked examples.

Everything that can be wrong with it is found here, before any model is loaded, and reported
together. Archives come from strangers: `trainer.members` reads them, and the limits there and below
bound what a hostile one can cost. Knows nothing of buckets or latents.
"""

import io
import logging
import os
import re
from dataclasses import dataclass, field
from pathlib import Path

from PIL import Image
from tqdm import tqdm

from families.tokens import whole_word
from inference.upright import IMAGE_FORMATS, upright_srgb
from trainer.members import (
    IMAGE_SUFFIXES,
    MAX_CAPTION_BYTES,
    Unusable,
    listed,
    read_files,
    stem_of,
    suffix_of,
)
from trainer.pictures import Checked, check, probe
from trainer.spool import Content
from trainer.threads import in_threads

log = logging.getLogger(__name__)

MAX_TOTAL_PIXELS = 30_000_000_000  # 1,250 photos of 24 megapixels; minutes of decoding
UNREAD_IMAGE_SUFFIXES = {".heic", ".heif", ".avif", ".jxl", ".gif", ".bmp", ".tif", ".tiff"}


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
        nested. Pictures are jpg, jpeg, png or webp; the caption of `a.jpg` is `a.txt` beside it.
    default_caption: for pictures without a caption file, or with an empty one.
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
    images = {name: files[name] for name in sorted(files) if suffix_of(name) in IMAGE_SUFFIXES}
    if not images and not problems and not bad:
        problems.append(
            f"holds no picture that can be read ({listed(sorted(files)) or 'it is empty'}); "
            "put JPEG, PNG or WebP pictures in it"
        )
    captions = _captions_by_stem(files, problems)

    checked = _check(images)
    examples, animated, silent, unmanaged = [], [], [], []
    for name, data in images.items():
        caption = _one_line(default_caption)
        if stem_of(name) in captions:
            caption_name, caption_data = captions[stem_of(name)]
            try:
                caption = _caption_text(caption_data) or caption
            except Unusable as error:
                problems.append(f"{caption_name}: {error}")
        caption = _one_line(f"{prefix}{caption}{suffix}")
        if subject is not None:
            caption, mentions = _place(subject, caption)
            if not mentions:
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
        examples.append(Example(name, caption, found.width, found.height, data))

    if skip_bad_images and bad and not examples:
        problems += [*bad, "holds no picture that can be used"]
    captioned = len(examples) if skip_bad_images else len(images)
    if captioned and len(silent) == captioned:
        problems.append(
            f"none of the {captioned} captions mentions the subject; write TOK or {subject} "
            "where it belongs, in the caption files or in default_caption "
            "('a photo of TOK'), or train without a placeholder token"
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
    _warn_left_out(path, files, captions)
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


def name_subject(text: str, subject: str) -> str:
    """The text with the subject's token in place of every whole word TOK (case matters)."""
    return _place(subject, text)[0]


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

    # The bar is only for those who wait.
    with tqdm(total=len(readable), desc="reading pictures", unit="picture", delay=2) as progress:
        for name, result in zip(readable, in_threads(checked, readable), strict=True):
            found[name] = result
            progress.update()
    return found


# ---- Captions ------------------------------------------------------------------------------------


def _place(subject: str, text: str) -> tuple[str, bool]:
    """The text with the subject in place of TOK, and whether it mentions the subject at all."""
    # The token is looked for first, so that the TOK within a token such as <TOK> is left alone.
    pattern = f"{whole_word(subject)}|{whole_word('TOK')}"
    text, mentions = re.subn(pattern, lambda _: subject, text)
    return text, mentions > 0


def _captions_by_stem(
    files: dict[str, Content], problems: list[str]
) -> dict[str, tuple[str, bytes]]:
    """Caption files as (name, content), by folder and name without the suffix."""
    captions: dict[str, tuple[str, bytes]] = {}
    for name in sorted(files):
        if suffix_of(name) != ".txt":
            continue
        if stem_of(name) in captions:
            first, _ = captions[stem_of(name)]
            problems.append(f"{name}: is a second caption beside {first}; remove one of them")
        captions[stem_of(name)] = name, bytes(files[name])
    return captions


def _caption_text(data: bytes) -> str:
    """A caption file's text on one line; empty when there is none. Raises Unusable."""
    if len(data) > MAX_CAPTION_BYTES:
        raise Unusable(f"is longer than {MAX_CAPTION_BYTES:,} bytes; shorten this caption")
    if data.startswith((b"\xff\xfe", b"\xfe\xff")):  # Notepad's "Unicode"
        encodings = ["utf-16"]
    else:
        # Latin-1 knows every byte, so one of these always fits.
        encodings = ["utf-8-sig", "cp1252", "latin-1"]
    for encoding in encodings:
        try:
            text = data.decode(encoding)
        except UnicodeDecodeError:
            continue
        if "\0" not in text:
            return _one_line(text)
        break
    raise Unusable("is not text; save the caption as a UTF-8 text file")


def _one_line(text: str) -> str:
    return " ".join(line.strip() for line in text.splitlines() if line.strip())


def _warn_left_out(
    path: Path, files: dict[str, Content], captions: dict[str, tuple[str, bytes]]
) -> None:
    unread = sorted(name for name in files if suffix_of(name) in UNREAD_IMAGE_SUFFIXES)
    if unread:
        log.warning(
            "%s: left out, because only JPEG, PNG and WebP are read: %s",
            path.name,
            listed(unread),
        )
    stems = {stem_of(name) for name in files if suffix_of(name) in IMAGE_SUFFIXES}
    orphans = sorted(name for stem, (name, _) in captions.items() if stem not in stems)
    if orphans:
        log.warning("%s: captions without a picture: %s", path.name, listed(orphans))
