"""The dataset of a run, the content of `run.json`, and the bounds of `meta.json`."""

import json
import platform
from collections.abc import Mapping, Sequence
from datetime import datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

from adapters.files.atomic import content_hash
from trainer.data import DatasetError, Example
from trainer.learning import data_identity
from trainer.settings import Settings

# meta.json must stay below what is read back (`adapters.archive`), whatever the dataset.
PICTURES_BYTES = 2 << 20  # of images and their captions
CAPTION_LETTERS = 1000
MEASUREMENTS = 1000  # of the validation

_LIBRARIES = ("diffusers", "peft", "safetensors", "torch", "transformers")


class DatasetFile:
    """The dataset's file as it was when it was read; a folder has no hash of its own."""

    def __init__(self, path: Path) -> None:
        """Made before the dataset is read."""
        self._path, self._before = path, _state(path)

    def describe(self, examples: Sequence[Example]) -> dict[str, Any]:
        """Name, hash, images and captions, made as soon as the dataset has been read.

        Raises `DatasetError` if the file was changed while it was read.
        """
        sha256 = content_hash(self._path) if self._path.is_file() else None
        if self._before != _state(self._path):
            raise DatasetError(
                f"{self._path.name}: was changed while it was read; start again when it is complete"
            )
        return {
            "name": self._path.name,
            "sha256": sha256,
            "captions": {  # how many images have one of their own, and use default_caption
                "own": sum(bool(each.caption_file) for each in examples),
                "default": sum(not each.caption_file for each in examples),
            },
            "pictures": [
                {"name": each.name, "caption": each.caption, "size": [each.width, each.height]}
                for each in examples
            ],
        }


def _state(path: Path) -> tuple[int, int, int] | None:
    """What changes with a file's content; None for a folder, or for nothing."""
    if not path.is_file():
        return None
    status = path.stat()
    return status.st_ino, status.st_size, status.st_mtime_ns


def describe_run(
    settings: Settings, examples: Sequence[Example], dataset: Mapping[str, Any], served: bool
) -> dict[str, Any]:
    """The content of `run.json`, for the person whose machine it is on: it names local paths.

    The settings hold no keys of accounts; those travel apart (`trainer.settings.secret`).
    """
    used = settings.model_dump(exclude={"base", "given"}) | {"base": settings.base.name}
    return {
        "served": served,
        "started": datetime.now().astimezone().isoformat(timespec="seconds"),
        "settings": {"given": settings.given.model_dump(exclude_unset=True), "used": used},
        "dataset": {
            "path": settings.dataset.absolute(),
            "sha256": dataset["sha256"],
            "images": data_identity(examples),  # by name: hashes of the image and of its caption
        },
        "versions": versions(),
    }


def bounded(meta: dict[str, Any]) -> dict[str, Any]:
    """The same, small enough to be read back, with a note where something is left out.

    Long captions are cut, and images and measurements beyond a number are left out. Settings are
    bounded when they enter (`trainer.settings.inputs`).
    """
    kind = "validation" if "validation" in meta else "fit"
    meta = {**meta, "dataset": dict(meta["dataset"]), kind: dict(meta[kind])}
    left_out = {}

    pictures = [dict(each) for each in meta["dataset"]["pictures"]]
    if _size(pictures) > PICTURES_BYTES:
        long = [each for each in pictures if len(each["caption"]) > CAPTION_LETTERS]
        for each in long:
            each["caption"] = each["caption"][:CAPTION_LETTERS] + "\u2026"
        kept, size = [], 0
        for each in pictures:
            size += _size(each)
            if size > PICTURES_BYTES:
                break
            kept.append(each)
        left_out["captions"] = f"{len(long)} are cut after {CAPTION_LETTERS} characters"
        left_out["pictures"] = f"{len(pictures) - len(kept)} of {len(pictures)} are left out"
        meta["dataset"]["pictures"] = kept

    steps, losses = meta[kind]["steps"], meta[kind]["losses"]
    if len(steps) > MEASUREMENTS:
        last = len(steps) - 1
        chosen = sorted({round(k * last / (MEASUREMENTS - 1)) for k in range(MEASUREMENTS)})
        meta[kind]["steps"] = [steps[index] for index in chosen]
        meta[kind]["losses"] = [losses[index] for index in chosen]
        left_out[kind] = f"{len(steps) - len(chosen)} of {len(steps)} are left out"
    return {**meta, "left_out": left_out} if left_out else meta


def _size(value: Any) -> int:
    """Bytes of a value in the file, indentation included."""
    return len(json.dumps(value, indent=8, ensure_ascii=False).encode(errors="backslashreplace"))


def versions() -> dict[str, str]:
    """Those of Python and of the libraries that results depend on."""
    return {"python": platform.python_version()} | {name: version(name) for name in _LIBRARIES}
