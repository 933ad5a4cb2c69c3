"""captions.jsonl: what was asked and answered, one JSON object per line, append-only.

A line with `caption` is the caption of one image:

    image       name in the dataset        sha256   of the image file
    model       captioner, with its commit
    question    hash of the question
    caption     with TOK; empty if no part of the answer was usable
    faults      what was wrong with the answer; the caption is its clean part
    asked       1, or 2 if the first answer was refused

A line with `features` is the identity of the subject: `kind`, and `images`, a hash of the set.

A caption file whose text differs from the log was edited by a person, and is never replaced.
"""

import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from trainer.captions.questions import Identity
from trainer.data import Example


@dataclass(frozen=True)
class Row:
    """The caption of one image."""

    image: str
    sha256: str
    model: str
    question: str
    caption: str
    faults: tuple[str, ...]
    asked: int


class Log:
    """The captions that were written by this program."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.rows: dict[str, Row] = {}  # the newest of each image
        self._identities: dict[tuple[str, str, str], Identity] = {}
        try:
            lines = path.read_bytes().splitlines()
        except FileNotFoundError:
            lines = []
        for line in lines:
            try:
                self._add(json.loads(line))
            except (ValueError, TypeError, KeyError, RecursionError):
                continue  # cut off when the process was killed

    def _add(self, found: dict[str, Any]) -> None:
        if "features" in found:
            identity = Identity(str(found["kind"]), tuple(map(str, found["features"])))
            self._identities[found["images"], found["model"], found["asked_for"]] = identity
        else:
            row = Row(**{**found, "faults": tuple(found["faults"])})
            self.rows[str(row.image)] = row

    def write(self, row: Row) -> None:
        """Appends the caption of an image."""
        self.rows[row.image] = row
        self._append(asdict(row))

    def identity(self, images: str, model: str, kind: str) -> Identity | None:
        """The identity that was found before in the same images, or None."""
        return self._identities.get((images, model, kind))

    def write_identity(self, images: str, model: str, kind: str, found: Identity) -> None:
        """Appends the identity of the subject. kind: the user's word for it."""
        self._identities[images, model, kind] = found
        facts = {"images": images, "model": model, "asked_for": kind}
        self._append({**facts, "kind": found.kind, "features": found.features})

    def _append(self, facts: dict[str, Any]) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        line = json.dumps(facts, ensure_ascii=False).encode(errors="backslashreplace")
        with self.path.open("a+b") as file:
            if file.tell():  # end a line that was cut off
                file.seek(-1, os.SEEK_END)
                line = line if file.read() == b"\n" else b"\n" + line
            file.write(line + b"\n")


def hash_of(content: bytes | memoryview) -> str:
    """SHA-256 of an image, in hexadecimal."""
    return hashlib.sha256(content).hexdigest()


def hash_of_set(examples: Sequence[Example]) -> str:
    """The same of a set of images, whatever their names and order."""
    found = sorted(hash_of(each.data) for each in examples)
    return hash_of("\n".join(found).encode())


def hash_of_question(text: str) -> str:
    """A short hash of a question."""
    return hash_of(text.encode())[:16]
