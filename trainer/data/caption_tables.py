"""Captions in JSON and in tables: of one image (`NAME.json`) or of many (`metadata.jsonl`).

Tables are JSONL and CSV with a row for each image, and JSON that maps names of images to captions
or lists such rows. Where programs differ, the first name that a row has is used.
"""

import csv
import io
import json
import posixpath
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import PurePosixPath
from typing import Any

from adapters.files.containers import Unusable
from trainer.data.caption_files import read_text
from trainer.data.mapped_file import Content
from trainer.data.members import MAX_TABLE_BYTES, stem_of, suffix_of

# Columns, in the order in which they are looked for.
_IMAGE_KEYS = ("file_name", "image_path", "image_file", "filename", "file", "image", "path")
_CAPTION_KEYS = ("caption", "text", "prompt", "captions")
_MASK_KEYS = ("mask_path", "mask_file", "mask_file_name", "mask_image", "mask")  # of lists
# Groups of tags, in the order in which they are joined. `nl` is a sentence after them.
_TAG_KEYS = (
    *("trigger", "quality", "count", "character", "series", "artist", "appearance", "tags"),
    "environment",
)
_SENTENCE = "nl"
# Columns with the images before an edit: of musubi-tuner (`control_path`, `control_path_0`),
# DiffSynth (`edit_image`) and others. The number at the end orders them.
_CONTROL_KEY = re.compile(
    r"(?:control|(?:control|edit|conditioning|reference|source|input)_image)"
    r"(?:_path|_file|_file_name)?_?([0-9]*)"
)


class NoCaptions(Exception):
    """JSON or a table without captions. The message is a reason: "it has no …"."""


@dataclass
class Table:
    """The captions in a table, by the image's name as it is written there."""

    name: str
    rows: dict[str, list[str]] = field(default_factory=dict)
    guess: str | None = None  # the encoding, if it was guessed


def read_table(name: str, data: Content) -> Table:
    """Reads a table. Raises `NoCaptions`, and `Unusable` if it is not text."""
    text, guess = _text(name, data)
    rows = _merged(_rows(suffix_of(name), text))
    captions = {image: row.captions for image, row in rows.items() if row.captions}
    found = Table(name, captions, guess)
    if not found.rows:
        raise NoCaptions("it has no row with the name of an image and a caption")
    return found


@dataclass
class Row:
    """What a table says of one image."""

    captions: list[str] = field(default_factory=list)
    mask: str = ""  # a file, as written; empty: none
    controls: list[str] = field(default_factory=list)  # images before an edit, as written


def image_rows(name: str, data: Content) -> dict[str, Row]:
    """The images that a table names, in order.

    Raises `NoCaptions`, and `Unusable` if it is not text.
    """
    return _merged(_rows(suffix_of(name), _text(name, data)[0], bare=True))


def _controls_of(row: Any) -> list[str]:
    """The control images in a row: of all their columns, each a name or a list of names."""
    if not isinstance(row, dict):
        return []
    columns = [
        (int(match[1] or 0), value)
        for key, value in row.items()
        if (match := _CONTROL_KEY.fullmatch(str(key).lower())) is not None and len(match[1]) < 5
    ]
    names: list[str] = []
    for _, value in sorted(columns, key=lambda each: each[0]):
        if isinstance(value, str) and value.lstrip().startswith("["):  # a list in CSV
            with suppress(NoCaptions):
                value = _parsed(value)
        values = value if isinstance(value, list) else [value]
        names += [each.strip() for each in values if isinstance(each, str) and each.strip()]
    return names


def _merged(rows: Iterable[tuple[str, Any]]) -> dict[str, Row]:
    """The different captions of each image, and its first mask; several rows may name it."""
    found: dict[str, Row] = {}
    for image, value in rows:
        row = found.setdefault(image, Row())
        row.captions += [each for each in _captions_of(value) if each not in row.captions]
        row.mask = row.mask or _mask_of(value)
        row.controls += [each for each in _controls_of(value) if each not in row.controls]
    return found


def control_rows(name: str, data: Content) -> dict[str, list[str]]:
    """The control images of each image for which a table names some, in order, as written.

    Raises `NoCaptions`, and `Unusable` if it is not text.
    """
    rows = image_rows(name, data).items()
    return {image: row.controls for image, row in rows if row.controls}


def read_json(name: str, data: Content) -> tuple[list[str], str | None]:
    """The captions in the JSON file of one image, and the encoding if it was guessed.

    Raises `NoCaptions`, and `Unusable` if it is not text.
    """
    text, guess = _text(name, data)
    found = _captions_of(_parsed(text))
    if not found:
        raise NoCaptions("it has no caption, text, prompt or tags")
    return found, guess


def _text(name: str, data: Content) -> tuple[str, str | None]:
    if len(data) > MAX_TABLE_BYTES:
        raise NoCaptions(f"it is longer than {MAX_TABLE_BYTES:,} bytes")
    return read_text(data)


def _parsed(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise NoCaptions(f"it is not valid JSON ({str(error)[:80]})") from None


def _rows(suffix: str, text: str, bare: bool = False) -> Iterator[tuple[str, Any]]:
    """The name of an image and what the table says of it, row by row.

    bare: a table may have no column of captions.
    """
    if suffix in (".csv", ".tsv"):
        yield from _csv_rows(text, suffix, bare)
        return
    if suffix == ".json":
        value = _parsed(text)
        rows: Iterable[Any] = value if isinstance(value, list) else ()
        if isinstance(value, dict):
            yield from (
                (image, row)
                for image, row in value.items()
                if _captions_of(row) or _controls_of(row)
            )
    else:
        rows = _lines(text)
    for row in rows:
        if isinstance(row, dict) and (key := _image_key(row)):
            yield row[key].strip(), row


def _lines(text: str) -> Iterator[Any]:
    """The values of JSONL. Raises `NoCaptions` if the first is not valid, and `Unusable` if only a
    later one is: a table with captions."""
    # Not splitlines(), which also divides at characters that JSON allows in a text, such as U+2028.
    whole = re.split("\r\n?|\n", text)
    lines = ((k, line) for k, line in enumerate(whole, start=1) if line.strip())
    for count, (number, line) in enumerate(lines):
        try:
            value = _parsed(line)
        except NoCaptions as error:
            if count:
                raise Unusable(f"line {number}: {error}; correct or remove it") from None
            raise
        yield value


def _csv_rows(text: str, suffix: str, bare: bool) -> Iterator[tuple[str, Any]]:
    text = re.sub(r"\A\s*\"?sep=.\"?[^\S\r\n]*[\r\n]+", "", text)  # Excel's
    delimiters = "\t" if suffix == ".tsv" else ",;\t"
    try:
        tables = [csv.DictReader(io.StringIO(text, newline=""), delimiter=d) for d in delimiters]
        named = (each for each in tables if _image_key(dict.fromkeys(_columns(each), "-")))
        rows = list(next(named, tables[0]))
    except csv.Error as error:
        raise NoCaptions(f"it is not a valid table ({error})") from None
    for row in rows:
        plain = {
            str(key).strip().lower(): value for key, value in row.items() if isinstance(value, str)
        }
        key = _image_key(plain)
        if key is None:
            if not any(plain.values()):
                continue
            raise NoCaptions("it has no column file_name")
        others = [other for other in plain if other != key and not _is_file_key(other)]
        column = next((each for each in _CAPTION_KEYS if each in plain), None)
        if column is None and len(others) == 1:
            column = others[0]  # of any name, as in the imagefolder format
        if column is None and not bare:
            raise NoCaptions("it has no column text, caption or prompt")
        caption = {"caption": plain[column]} if column is not None else {}
        yield plain[key].strip(), caption | {k: plain[k] for k in plain if _is_file_key(k)}


def _columns(table: "csv.DictReader[str]") -> list[str]:
    return [each.strip().lower() for each in table.fieldnames or ()]


def _is_file_key(key: str) -> bool:
    """Whether a column names masks or control images."""
    return key in _MASK_KEYS or _CONTROL_KEY.fullmatch(key) is not None


def _image_key(row: Mapping[str, Any]) -> str | None:
    """The column with the name of a row's image."""
    # Of the imagefolder format.
    others = [k for k in row if str(k).endswith("_file_name") and not _is_file_key(str(k))]
    for key in (*_IMAGE_KEYS, *others):
        if isinstance(row.get(key), str) and row[key].strip():
            return str(key)
    return None


def _mask_of(row: Any) -> str:
    """The file of the mask in a row; empty if it names none."""
    texts = (row.get(key) for key in _MASK_KEYS) if isinstance(row, dict) else ()
    return next((each.strip() for each in texts if isinstance(each, str) and each.strip()), "")


def _captions_of(value: Any) -> list[str]:
    """The captions in a JSON value: a text, a list of texts, or an object."""
    if isinstance(value, str):
        return [value] if value.strip() else []
    if isinstance(value, list):
        return [each for each in value if isinstance(each, str) and each.strip()]
    if not isinstance(value, dict):
        return []
    for key in _CAPTION_KEYS:
        if isinstance(value.get(key), str | list) and (found := _captions_of(value[key])):
            return found
    tags = _joined_tags(value)
    return [tags] if tags else []


def _joined_tags(value: Mapping[str, Any]) -> str:
    """Tags in groups, as one caption: trigger, groups, and a sentence."""
    tags = value.get("tags")
    groups: dict[str, Any] = {**value, **tags} if isinstance(tags, dict) else dict(value)
    if isinstance(tags, dict) and "tags" not in tags:
        groups.pop("tags")
    about = value.get("meta")
    if isinstance(about, dict) and "trigger" in about:
        groups["trigger"] = about["trigger"]
    parts: dict[str, None] = {}
    for key in _TAG_KEYS:
        group = groups.get(key)
        for each in group if isinstance(group, list) else [group]:
            if isinstance(each, str | int) and not isinstance(each, bool) and str(each).strip():
                parts[str(each).strip()] = None
    sentence = groups.get(_SENTENCE)
    sentences = [sentence.strip()] if isinstance(sentence, str) and sentence.strip() else []
    if list(parts) == [str(groups.get("trigger", "")).strip()] and not sentences:
        return ""  # the trigger alone describes nothing
    return ". ".join([", ".join(parts)] * bool(parts) + sentences)


class Names:
    """Finds the image that a table means."""

    def __init__(self, images: Sequence[str]) -> None:
        self._images = set(images)
        self._by_stem: dict[str, list[str]] = {}
        self._by_end: dict[str, list[str]] = {}
        for name in images:
            self._by_stem.setdefault(stem_of(name), []).append(name)
            last = PurePosixPath(name).name
            for end in dict.fromkeys((last, PurePosixPath(last).stem)):
                self._by_end.setdefault(end, []).append(name)

    def find(self, written: str, table: str) -> list[str]:
        """The images with this name in a table: relative to it, else with the same last part.

        Absolute names are those of another machine, so only their last part counts; it must be
        unique. A name without a suffix may mean several images.
        """
        name = written.replace("\\", "/")
        relative = posixpath.normpath(str(PurePosixPath(table).parent / name))
        if relative in self._images:
            return [relative]
        if found := self._by_stem.get(relative):
            return found
        found = self._by_end.get(PurePosixPath(name).name, [])
        return found if len(found) == 1 else []
