"""What a baked model says of itself: its tokens, meta.json, and the record of its LoRAs."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from adapters.archive import header_of
from adapters.baked import BakedLora, baked_loras, header_of_baked
from adapters.comfyui import embedding_files, how_to_write
from adapters.formats import shown
from adapters.placeholder import Placeholder
from adapters.placeholder_token import PlaceholderError, check_distinct
from adapters.tools.checkpoint import Checkpoint
from adapters.tools.merge import meta_of, named
from adapters.tools.opened import Opened, ToolError, check_width
from adapters.trained_model import is_trained_model, read_trained_model
from families.base import Base
from families.registry import BAKED, by_hub_id, family_of


def facts_of(
    opened: Opened, placeholders: Sequence[Placeholder], scale: float
) -> tuple[dict[str, Any], dict[str, str]]:
    """The content of meta.json, and the header of the weights' files."""
    archive, base = opened.archive, opened.base
    meta = meta_of(opened) | named(placeholders) | {"trained": BAKED, "base_model": _origin(base)}
    added = BakedLora(opened.name, archive.lora_sha256, archive.tokens, scale)
    loras = header_of_baked([*baked_loras(base), added])
    return meta, {"format": "pt", **header_of(meta), **loras}


def _origin(base: Base) -> str:
    """The Hub id of the known base whose other components and defaults a baked one has.

    Else the base's own name: then its folder has to be named to generate.
    """
    known = by_hub_id(base.hub_id) or base.completed_by
    like = known is not None and known.sample_sigmas == base.sample_sigmas
    return known.hub_id if known is not None and like else base.hub_id


def placeholders_of(opened: Opened) -> tuple[Placeholder, ...]:
    """The tokens of the LoRA, and those that its base model has.

    Raises `ToolError` for two that cannot be together, and `LoraMismatch` for another model's.
    """
    folder, found = opened.base.folder, opened.archive.placeholders
    if folder is None or not is_trained_model(folder):
        return found
    own = read_trained_model(folder).placeholders
    check_width(own, opened.base, folder.name)
    found += own
    try:
        check_distinct([each.token for each in found])
    except PlaceholderError as error:
        raise ToolError(f"{opened.name} and {opened.base.name}: {error}") from error
    return found


def embeddings_of(
    placeholders: Sequence[Placeholder], base: Base, output: Path
) -> dict[Path, bytes]:
    """The embeddings of the tokens for ComfyUI, by the path of their file."""
    reader = family_of(base).lora_readers.get("comfyui")
    if reader is None or not reader.embedding:
        return {}
    return {output.parent / name: data for name, data in embedding_files(placeholders).items()}


def notes_of(
    opened: Opened,
    placeholders: Sequence[Placeholder],
    base: Checkpoint,
    output: Path,
    embeddings: Sequence[Path],
) -> Iterator[str]:
    terms = opened.base.terms
    if terms is not None:
        yield f"{terms.notice} {terms.url}"
    if base.unused:
        yield f"not in the model, so not written: {shown(base.unused)}"
    if output.suffix != ".safetensors":
        yield f"to generate with it: --base-model {output}"
    elif embeddings:
        yield f"copy {', '.join(each.name for each in embeddings)} to models/embeddings"
        yield from how_to_write(placeholders)
    elif placeholders:
        tokens = " ".join(each.token for each in placeholders)
        yield f"ComfyUI reads no embeddings for this model, so not the token {tokens}"
