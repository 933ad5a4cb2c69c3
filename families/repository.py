"""Where a base model's files lie: embedded, a local folder, `$MODEL_VAULT`, or the Hub.

One rule for all: `component_folder` answers with a local folder in the Hub's own layout, and
fetches from the Hub only what is nowhere on this machine.
"""

import os
from pathlib import Path

from families.bases import Base, by_hub_id

# What a base's repository holds that we read; sample pictures and other formats stay on the Hub.
VAULT_PATTERNS = [
    "model_index.json",
    "*.safetensors",
    *(f"{part}/*" for part in ("scheduler", "text_encoder", "tokenizer", "transformer", "vae")),
]


class MissingModel(RuntimeError):
    """A base model, or a part of it, that is not on this machine and cannot be fetched."""


def vault() -> Path | None:
    """The folder `$MODEL_VAULT` names, or None. Raises `MissingModel` if it does not exist."""
    named = os.environ.get("MODEL_VAULT")
    if not named:
        return None
    folder = Path(named).expanduser()
    if not folder.is_dir():
        raise MissingModel(f"MODEL_VAULT={named} is not a folder; create it or unset MODEL_VAULT")
    return folder


def component_folder(base: Base, component: str) -> Path:
    """The local folder of one component (`transformer`, `vae`, …) of a base.

    A repository that lacks the component is completed by `base.completed_by`. Raises
    `MissingModel` with what was looked for and where.
    """
    own = _local(base)
    if own is not None and not (own / component).is_dir() and base.completed_by:
        other = by_hub_id(base.completed_by)
        assert other is not None, f"{base.name}: completed_by names no base of the table"
        return component_folder(other, component)
    if own is not None:
        if (own / component).is_dir():
            return own / component
        raise MissingModel(f"{own} has no folder {component!r}; complete it or remove it")
    if base.completed_by and component != "transformer":
        other = by_hub_id(base.completed_by)
        assert other is not None, f"{base.name}: completed_by names no base of the table"
        return component_folder(other, component)
    return download(base.hub_id, [f"{component}/*"]) / component


def transformer_source(base: Base) -> Path:
    """The transformer's folder, or its one checkpoint file in the original key layout.

    A repository that holds no `transformer/` folder but exactly one `.safetensors` at its top
    (as ostris/Z-Image-De-Turbo once did) is taken by that file.
    """
    own = _local(base)
    if own is None:
        own = download(base.hub_id, ["transformer/*", "*.safetensors"])
    if (own / "transformer").is_dir():
        return own / "transformer"
    files = sorted(own.glob("*.safetensors"))
    if len(files) == 1:
        return files[0]
    found = ", ".join(file.name for file in files) or "none"
    raise MissingModel(
        f"{own}: expected a folder 'transformer' or one .safetensors file, found {found}"
    )


def _local(base: Base) -> Path | None:
    """The base's folder on this machine, or None where it has to come from the Hub."""
    shelf = vault()
    if shelf is not None and (shelf / base.hub_id).is_dir():
        return shelf / base.hub_id
    if base.folder is not None:
        if base.folder.is_dir():
            return base.folder
        raise MissingModel(f"{base.name}: folder {base.folder} does not exist")
    return None


def download(hub_id: str, patterns: list[str]) -> Path:
    """Fetches the matching files of a Hub repository into the Hub's cache; returns the snapshot.

    Raises `MissingModel` with the ways out when the Hub cannot be reached.
    """
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(hub_id, allow_patterns=patterns))
    except Exception as error:
        shelf = os.environ.get("MODEL_VAULT")
        looked = f"not in MODEL_VAULT={shelf}, and " if shelf else ""
        raise MissingModel(
            f"{hub_id} ({', '.join(patterns)}): {looked}could not be fetched from the Hub "
            f"({type(error).__name__}: {error}). Fill a vault with "
            f"`python -m families.download` on a machine with a network, or set HF_TOKEN if the "
            f"model is gated"
        ) from error
