"""The dataset's description, the content of `run.json`, and the size limits of `meta.json`."""

import json
import platform
from collections.abc import Mapping, Sequence
from datetime import datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

from adapters.files.atomic import content_hash
from trainer.data import DatasetError, Example
from trainer.dataset_names import dataset_name
from trainer.learning import data_identity
from trainer.settings import Settings

# meta.json must stay below the size limit of `adapters.archive`, for any dataset.
IMAGES_BYTES = 2 << 20  # image names and captions
CAPTION_CHARACTERS = 1000
MEASUREMENTS = 1000  # of the validation loss

_LIBRARIES = ("diffusers", "peft", "safetensors", "torch", "transformers")


class DatasetFile:
    """Detects changes of the dataset's file while it is read. A folder has no hash."""

    def __init__(self, path: Path) -> None:
        """Create it before the dataset is read."""
        self._path, self._before = path, _state(path)

    def describe(
        self, examples: Sequence[Example], regularized: Sequence[Example] = ()
    ) -> dict[str, Any]:
        """Name, hash, images and captions. Call it as soon as the dataset has been read.

        Raises `DatasetError` if the file was changed in the meantime.
        """
        sha256 = content_hash(self._path) if self._path.is_file() else None
        if self._before != _state(self._path):
            raise DatasetError(
                f"{dataset_name(self._path)}: was changed while it was read; start again when it "
                "is complete"
            )
        return {
            "name": dataset_name(self._path),
            "sha256": sha256,
            "captions": {  # number of images with a caption, and with default_caption
                "own": sum(bool(each.caption_file) for each in examples),
                "default": sum(not each.caption_file for each in examples),
            },
            "masks": sum(bool(each.mask_file) for each in examples),  # that are used
            "regularization": len(regularized),  # images that are used
            "controls": sum(len(each.controls) for each in examples),  # images before an edit
            "pictures": [_described(each) for each in examples],
        }


def _described(example: Example) -> dict[str, Any]:
    size = [example.width, example.height]
    facts: dict[str, Any] = {"name": example.name, "caption": example.caption, "size": size}
    if example.controls:
        facts["controls"] = [each.name for each in example.controls]
    return facts


def _state(path: Path) -> tuple[int, int, int] | None:
    """Inode, size and modification time of a file; None for a folder or a missing file."""
    if not path.is_file():
        return None
    status = path.stat()
    return status.st_ino, status.st_size, status.st_mtime_ns


def describe_run(
    settings: Settings, examples: Sequence[Example], dataset: Mapping[str, Any], served: bool
) -> dict[str, Any]:
    """The content of `run.json`. It contains local paths and is not meant to be shared.

    It contains no keys of accounts: they are not settings (`trainer.settings.secret`).
    """
    used = settings.model_dump(exclude={"base", "given"}) | {"base": settings.base.name}
    return {
        "served": served,
        "started": datetime.now().astimezone().isoformat(timespec="seconds"),
        "settings": {"given": settings.given.model_dump(exclude_unset=True), "used": used},
        "dataset": {
            "path": settings.dataset.absolute(),
            "sha256": dataset["sha256"],
            "images": data_identity(examples),  # by name: hashes of image, caption and used mask
        },
        "versions": versions(),
    }


def tokens_in(meta: Mapping[str, Any]) -> list[str]:
    """The placeholder tokens of a run, from its meta.json."""
    several, token = meta.get("placeholder_tokens"), meta.get("placeholder_token")
    return list(several) if several else [token] if token else []


def bounded(meta: dict[str, Any]) -> dict[str, Any]:
    """Limits the size of `meta`, so that it can be read back; notes omissions in `left_out`.

    Truncates long captions and omits images and measurements beyond a limit. The size of settings
    is limited by `trainer.settings.inputs`.
    """
    kind = "validation" if "validation" in meta else "fit"
    meta = {**meta, "dataset": dict(meta["dataset"]), kind: dict(meta[kind])}
    left_out = {}

    images = [dict(each) for each in meta["dataset"]["pictures"]]
    if _size(images) > IMAGES_BYTES:
        long = [each for each in images if len(each["caption"]) > CAPTION_CHARACTERS]
        for each in long:
            each["caption"] = each["caption"][:CAPTION_CHARACTERS] + "\u2026"
        kept, size = [], 0
        for each in images:
            size += _size(each)
            if size > IMAGES_BYTES:
                break
            kept.append(each)
        left_out["captions"] = f"{len(long)} are truncated to {CAPTION_CHARACTERS} characters"
        left_out["pictures"] = f"{len(images) - len(kept)} of {len(images)} are omitted"
        meta["dataset"]["pictures"] = kept

    steps, losses = meta[kind]["steps"], meta[kind]["losses"]
    if len(steps) > MEASUREMENTS:
        last = len(steps) - 1
        chosen = sorted({round(k * last / (MEASUREMENTS - 1)) for k in range(MEASUREMENTS)})
        meta[kind]["steps"] = [steps[index] for index in chosen]
        meta[kind]["losses"] = [losses[index] for index in chosen]
        left_out[kind] = f"{len(steps) - len(chosen)} of {len(steps)} are omitted"
    return {**meta, "left_out": left_out} if left_out else meta


def _size(value: Any) -> int:
    """Bytes of a value in the file, including indentation."""
    return len(json.dumps(value, indent=8, ensure_ascii=False).encode(errors="backslashreplace"))


def versions() -> dict[str, str]:
    """The versions of Python and of the libraries that affect results."""
    return {"python": platform.python_version()} | {name: version(name) for name in _LIBRARIES}
