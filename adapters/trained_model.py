"""Writes and reads the result of a full training: a folder with the whole transformer.

    transformer/                        as diffusers writes it: config.json, safetensors in shards
    embeddings/placeholder.safetensors  as in weights.zip (`adapters.archive`), with a token only
    meta.json                           base model, settings and results of the run

Generation reads it as weights, or as a base model whose other parts are those of the base model
that it was trained on (`families.registry.with_transformer`).
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from safetensors.torch import save_file

from adapters.archive import Archive, read_loose_placeholders
from adapters.archive_members import (
    FORMAT_VERSION,
    META,
    PLACEHOLDER,
    BrokenArchive,
    placeholder_name,
)
from adapters.files.atomic import atomic_file, atomic_folder
from adapters.placeholder import Placeholder
from families.registry import meta_of_full_training

TRANSFORMER = "transformer"
SHARD = "5GB"  # as published models; a file system may have a limit


def write_trained_model(
    transformer: Any, placeholders: Sequence[Placeholder], meta: Mapping[str, Any], path: Path
) -> Path:
    """Writes the folder atomically; an earlier one of that name is replaced at the end.

    `transformer` is a model of diffusers. Weights keep their dtype.
    """
    with atomic_folder(path) as folder:
        transformer.save_pretrained(folder / TRANSFORMER, max_shard_size=SHARD)
        _without_local_path(folder / TRANSFORMER / "config.json")
        for number, each in enumerate(placeholders):
            file = folder / placeholder_name(number)
            file.parent.mkdir(exist_ok=True)
            save_file({each.token: each.vectors.detach().float().cpu().contiguous()}, file)
        write_meta(meta, folder)
    return path


def write_meta(meta: Mapping[str, Any], folder: Path) -> None:
    """Writes or replaces the meta.json of a folder."""
    content = {"format_version": FORMAT_VERSION, **meta}
    text = json.dumps(content, indent=2, sort_keys=True, ensure_ascii=False)
    with atomic_file(folder / META) as file:
        file.write(text.encode(errors="backslashreplace"))


def is_trained_model(path: Path) -> bool:
    """Whether this is a folder that a full training wrote."""
    return path.is_dir() and meta_of_full_training(path) is not None


def read_trained_model(folder: Path) -> Archive:
    """The folder as weights: tokens and meta.json; `Archive.model` is the folder, no LoRA is in it.

    Raises `BrokenArchive` if it is not one that a full training wrote.
    """
    meta = meta_of_full_training(folder)
    if meta is None or not (folder / TRANSFORMER).is_dir():
        raise BrokenArchive(
            f"{folder} is not the result of a full training: it has no {META} with training: full, "
            f"or no folder {TRANSFORMER}"
        )
    first = folder / PLACEHOLDER
    placeholders = read_loose_placeholders(first) if first.is_file() else ()
    return Archive({}, placeholders, meta, model=folder)


def _without_local_path(config: Path) -> None:
    """Removes the path of the base model on this machine, which diffusers writes."""
    content = json.loads(config.read_text(encoding="utf-8"))
    content.pop("_name_or_path", None)
    config.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")
