"""Finds a base model's files: a folder, `$MODEL_VAULT`, in this project, or on the Hub.

`component_folder` returns a local folder in the Hub's layout, and downloads from the Hub only what
is not on this machine. `$MODEL_VAULT` is the model folder: downloaded models as ORG/NAME.
"""

import json
import logging
import os
from functools import cache
from pathlib import Path
from typing import Any

from families.base import AdapterFile, Base

log = logging.getLogger(__name__)

COMPONENTS = ("scheduler", "text_encoder", "vae")  # beside the transformer and the tokenizer
TOKENIZERS = ("tokenizer", "processor")  # folders that may contain it (`Family.tokenizer_folder`)

# The files of a base's repository that are used; sample images and other formats are not
# downloaded.
VAULT_PATTERNS = [
    "model_index.json",
    "*.safetensors",
    *(f"{part}/*" for part in (*COMPONENTS, *TOKENIZERS, "transformer")),
]

# The same of a repository with a single model.
MODEL_PATTERNS = ["*.json", "*.safetensors", "merges.txt"]

_MAX_SHORT_HEADER = 1 << 16  # bytes
# A component's config file; the others have a config.json.
_CONFIGS = {
    "scheduler": "scheduler_config.json",
    **dict.fromkeys(TOKENIZERS, "tokenizer_config.json"),
}


class MissingModel(RuntimeError):
    """A base model, or a part of it, that is not on this machine and cannot be downloaded."""


def model_folder() -> Path | None:
    """The folder in `$MODEL_VAULT`, or None. Raises `MissingModel` if it does not exist."""
    named = os.environ.get("MODEL_VAULT")
    if not named:
        return None
    folder = Path(named).expanduser()
    if not folder.is_dir():
        raise MissingModel(f"MODEL_VAULT={named} is not a folder; create it or unset MODEL_VAULT")
    return folder


def component_folder(base: Base, component: str) -> Path:
    """The local folder of one component (`transformer`, `vae`, …) of a base.

    A component that the repository lacks is taken from `base.completed_by`. For `transformer`,
    only the config is guaranteed: see `transformer_source`. Raises `MissingModel` with what was
    looked for and where.
    """
    own = _local(base)
    completes = base.completed_by
    if own is None and (completes is None or component == "transformer"):
        own = _from_hub(base, [f"{component}/*"])
    if own is not None and (own / component).is_dir():
        return whole_folder(own / component, weights=component in ("text_encoder", "vae"))
    if completes is not None:
        return component_folder(completes, component)
    raise MissingModel(f"{own} has no folder {component!r}; complete it or remove it")


def transformer_source(base: Base) -> Path:
    """The transformer's folder, or its one checkpoint file in the original key layout.

    The file is used if the repository has no `transformer/` folder and exactly one `.safetensors`
    at its top (as ostris/Z-Image-De-Turbo once had).
    """
    own = _local(base)
    if own is None:
        own = _from_hub(base, ["transformer/*", "*.safetensors"])
    if (own / "transformer").is_dir():
        return whole_folder(own / "transformer", weights=True)
    files = sorted(own.glob("*.safetensors"))
    if len(files) > 1:  # embeddings of tokens, which `adapters bake` writes next to the model
        files = [each for each in files if not _has_one_tensor(each)]
    if len(files) == 1:
        return files[0]
    found = ", ".join(file.name for file in files) or "none"
    raise MissingModel(
        f"{own}: expected a folder 'transformer' or one .safetensors file, found {found}"
    )


def _has_one_tensor(file: Path) -> bool:
    """Whether a safetensors file has only one tensor, by its header, which is then short."""
    with file.open("rb") as opened:
        length = int.from_bytes(opened.read(8), "little")
        text = opened.read(length) if length <= _MAX_SHORT_HEADER else b""
    try:
        return len(json.loads(text).keys() - {"__metadata__"}) == 1
    except (ValueError, AttributeError, RecursionError):
        return False


def adapter_path(adapter: AdapterFile) -> Path:
    """The local file of a training adapter. Raises `MissingModel` if it cannot be found."""
    models = model_folder()
    places = [place for place in (models and models / adapter.hub_id, adapter.included) if place]
    for place in places:
        if (place / adapter.name).is_file():
            return place / adapter.name
    if adapter.included is not None:
        raise MissingModel(f"training adapter {adapter.included / adapter.name} does not exist")
    path = download(adapter.hub_id, [adapter.name]) / adapter.name
    if not path.is_file():
        raise MissingModel(f"{adapter.hub_id} contains no file {adapter.name}")
    return path


def single_model_folder(hub_id: str, revision: str) -> Path:
    """The local folder of a repository with a single model, weights and tokenizer at its top.

    Raises `MissingModel`.
    """
    own = local_model_folder(hub_id) or download(hub_id, MODEL_PATTERNS, revision)
    return whole_folder(own, weights=True)


def local_model_folder(hub_id: str) -> Path | None:
    """The folder of a repository in `$MODEL_VAULT`, or None."""
    models = model_folder()
    return models / hub_id if models is not None and (models / hub_id).is_dir() else None


def local_config(base: Base, component: str) -> dict[str, Any] | None:
    """A component's config if it is on this machine; None if it would be downloaded."""
    owner: Base | None = base
    while owner is not None:
        folder = _local(owner)
        file = folder / component / "config.json" if folder is not None else None
        if file is not None and file.is_file():
            return json.loads(file.read_text(encoding="utf-8"))
        owner = owner.completed_by
    return None


def whole_folder(folder: Path, weights: bool) -> Path:
    """The component's folder. Raises `MissingModel` if it lacks a file that is needed."""
    needed = [_CONFIGS.get(folder.name, "config.json")]
    if weights:
        indices = sorted(folder.glob("*.safetensors.index.json"))
        for index in indices:
            needed += sorted(set(json.loads(index.read_text())["weight_map"].values()))
        if not indices and not any(folder.glob("*.safetensors")):
            needed.append("*.safetensors")
    missing = [name for name in needed if not (folder / name).is_file()]
    if missing:
        raise MissingModel(f"{folder} lacks {', '.join(missing)}; download the model again")
    return folder


def _local(base: Base) -> Path | None:
    """The base's folder on this machine, or None if it has to be downloaded from the Hub."""
    if base.folder is not None:
        return base.folder
    if (own := local_model_folder(base.hub_id)) is not None:
        return own
    if base.included is not None:
        if base.included.is_dir():
            return base.included
        raise MissingModel(f"{base.name}: folder {base.included} does not exist")
    return None


def _from_hub(base: Base, patterns: list[str]) -> Path:
    """`download` of a base's files; logs what its license asks for, once."""
    if base.terms is not None:
        _log_terms(f"{base.license}: {base.terms.notice} {base.terms.url}")
    return download(base.hub_id, patterns)


@cache
def _log_terms(text: str) -> None:
    log.info("%s", text)


def download(hub_id: str, patterns: list[str], revision: str | None = None) -> Path:
    """Downloads the matching files of a Hub repository into the Hub's cache; returns the snapshot.

    revision: a commit; the newest one by default.
    Raises `MissingModel` that says what to do if the Hub cannot be reached.
    """
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(hub_id, revision=revision, allow_patterns=patterns))
    except Exception as error:
        models = os.environ.get("MODEL_VAULT")
        looked = f"not in MODEL_VAULT={models}, and " if models else ""
        raise MissingModel(
            f"{hub_id} ({', '.join(patterns)}): {looked}could not be downloaded from the Hub "
            f"({type(error).__name__}: {error}). Fill a model folder ($MODEL_VAULT) with "
            f"`python -m families.download` on a machine with a network, or set HF_TOKEN if the "
            f"model is gated"
        ) from error


def is_on_disk(base: Base) -> bool:
    """Whether the base's files are on this machine: in a folder, or in the Hub's cache."""
    try:
        own = _local(base) is not None
    except MissingModel:
        return False
    own = own or is_in_hub_cache(base.hub_id)
    return own and (base.completed_by is None or is_on_disk(base.completed_by))


def is_in_hub_cache(hub_id: str, revision: str = "") -> bool:
    """Whether the Hub's cache has this commit of a repository; by default any of its commits."""
    from huggingface_hub.constants import HF_HUB_CACHE

    snapshots = Path(HF_HUB_CACHE, f"models--{hub_id.replace('/', '--')}", "snapshots")
    if revision:
        return (snapshots / revision).is_dir()
    return snapshots.is_dir() and any(snapshots.iterdir())
