"""Reads caption files: `photo.txt` is the caption of `photo.jpg`."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from adapters.files.containers import Unusable
from trainer.data.mapped_file import Content
from trainer.data.members import (
    CAPTION_SUFFIXES,
    HEAD_BYTES,
    MAX_CAPTION_BYTES,
    kind_of,
    stem_of,
    suffix_of,
)
from trainer.encodings import decode


@dataclass(frozen=True)
class CaptionFile:
    """A caption file: its text on one line, maybe empty."""

    name: str
    text: str
    guess: str | None  # the encoding, if it was guessed


class Sidecars:
    """The files that are named after an image: `photo.txt`, `photo.jpg.txt`, `photo.json`."""

    def __init__(
        self, files: Iterable[str], problems: list[str], roots: Mapping[str, str] | None = None
    ) -> None:
        """roots: a further name without suffix of some images, whose files count last."""
        self._roots = roots or {}
        self._by_stem: dict[str, dict[str, str]] = {}
        for name in sorted(files):
            if suffix_of(name) not in (*CAPTION_SUFFIXES, ".json"):
                continue
            known = self._by_stem.setdefault(stem_of(name), {})
            first = known.setdefault(suffix_of(name), name)
            if first != name:
                problems.append(f"{name}: is a second caption in addition to {first}; remove one")

    def of(self, image: str) -> list[str]:
        """The files of an image, those that count more first."""
        stems = dict.fromkeys((stem_of(image), image, self._roots.get(image, image)))
        known = [self._by_stem.get(stem, {}) for stem in stems]
        suffixes = (*CAPTION_SUFFIXES, ".json")
        return [each[suffix] for suffix in suffixes for each in known if suffix in each]


def read_caption(name: str, data: Content) -> CaptionFile:
    """Reads one caption file. Raises `Unusable`."""
    if len(data) > MAX_CAPTION_BYTES:
        raise Unusable(f"is longer than {MAX_CAPTION_BYTES:,} bytes; shorten this caption")
    text, guess = read_text(data)
    return CaptionFile(name, one_line(text), guess)


def read_text(data: Content) -> tuple[str, str | None]:
    """`decode` of a caption file or table; says what a file is that is no text."""
    try:
        return decode(bytes(data))
    except Unusable as error:
        kind = kind_of(bytes(data[:HEAD_BYTES]))
        if kind is None or kind.startswith("JSON"):
            raise
        raise Unusable(
            f"is not text, it begins like {kind}; rename it with its own extension, or remove it"
        ) from error


def one_line(text: str) -> str:
    """The text's lines, joined by spaces."""
    return " ".join(line.strip() for line in text.splitlines() if line.strip())


def folder_caption(files: Mapping[str, Content], image: str, stems: set[str]) -> str | None:
    """The name of the `default.txt` in an image's folder; None if it belongs to an image."""
    folder = image.rpartition("/")[0]
    name = f"{folder}/default.txt" if folder else "default.txt"
    return name if name in files and stem_of(name) not in stems else None


def files_of(files: Mapping[str, Content], captions: Mapping[str, str]) -> dict[str, bytes]:
    """The caption files of captions by image; a file that an image has keeps its name."""
    sidecars = Sidecars(files, [])
    own = {name: next(iter(sidecars.of(name)), "") for name in captions}
    return {
        own[name] if suffix_of(own[name]) == ".txt" else f"{stem_of(name)}.txt": text.encode()
        for name, text in captions.items()
    }
