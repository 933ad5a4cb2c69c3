"""Writes and reads a whole transformer: the result of a full training, or of `adapters bake`.

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

from adapters.archive import Archive, header_of, read_archive, read_loose_placeholders
from adapters.archive_members import (
    FORMAT_VERSION,
    META,
    PLACEHOLDER,
    BrokenArchive,
    placeholder_name,
)
from adapters.files.atomic import atomic_file, atomic_folder
from adapters.files.tensor_writer import Planned, write_shards
from adapters.placeholder import Placeholder
from families.registry import meta_of_full_training

TRANSFORMER = "transformer"


def write_trained_model(
    transformer: Any, placeholders: Sequence[Placeholder], meta: Mapping[str, Any], path: Path
) -> Path:
    """Writes the folder atomically; an earlier one of that name is replaced at the end.

    `transformer` is a model of diffusers. Weights keep their dtype.
    """
    with atomic_folder(path) as folder:
        _write_transformer(transformer, folder / TRANSFORMER, header_of(meta))
        write_placeholders(placeholders, folder)
        write_meta(meta, folder)
    return path


def write_placeholders(placeholders: Sequence[Placeholder], folder: Path) -> None:
    """Writes the embeddings of the tokens into a folder."""
    for number, each in enumerate(placeholders):
        file = folder / placeholder_name(number)
        file.parent.mkdir(exist_ok=True)
        save_file({each.token: each.vectors.detach().float().cpu().contiguous()}, file)


def write_meta(meta: Mapping[str, Any], folder: Path) -> None:
    """Writes or replaces the meta.json of a folder."""
    content = {"format_version": FORMAT_VERSION, **meta}
    text = json.dumps(content, indent=2, sort_keys=True, ensure_ascii=False)
    with atomic_file(folder / META) as file:
        file.write(text.encode(errors="backslashreplace"))


def is_trained_model(path: Path) -> bool:
    """Whether this is a folder that a full training or `adapters bake` wrote."""
    return meta_of_full_training(path) is not None


def read_trained_model(folder: Path) -> Archive:
    """The folder as weights: tokens and meta.json; `Archive.model` is the folder, no LoRA is in it.

    Raises `BrokenArchive` if it is another folder.
    """
    meta = meta_of_full_training(folder)
    if meta is None or not (folder / TRANSFORMER).is_dir():
        raise BrokenArchive(
            f"{folder} is not the result of a full training or of bake: it has no {META} that says "
            f"so, or no folder {TRANSFORMER}"
        )
    first = folder / PLACEHOLDER
    placeholders = read_loose_placeholders(first) if first.is_file() else ()
    return Archive({}, placeholders, meta, model=folder)


def read_weights(path: Path, config: Path | None = None) -> Archive:
    """Weights of any kind: the folder of a whole transformer, or what `read_archive` reads."""
    whole = is_trained_model(path)
    return read_trained_model(path) if whole else read_archive(path, config=config)


def _write_transformer(transformer: Any, folder: Path, header: Mapping[str, str]) -> None:
    """As `save_pretrained` of diffusers, but without the base model's path."""
    transformer.save_config(folder)
    config = folder / "config.json"
    content = json.loads(config.read_text(encoding="utf-8"))
    content.pop("_name_or_path", None)
    config.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    # Large values first, so that all begin at multiples of their size.
    tensors = sorted(transformer.state_dict().items(), key=lambda row: -row[1].itemsize)
    planned = {name: Planned(each.dtype, tuple(each.shape)) for name, each in tensors}
    values = ((name, each.detach().cpu()) for name, each in tensors)
    write_shards(folder, planned, values, {"format": "pt", **header})
