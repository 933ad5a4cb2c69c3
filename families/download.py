"""python -m families.download NAME…: fills `$MODEL_VAULT` from the Hub."""

import argparse
import os
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from families.captioners import CAPTIONERS
from families.registry import BASES, UnknownBase, by_hub_id, family_of, find_base
from families.repository import (
    COMPONENTS,
    MODEL_PATTERNS,
    VAULT_PATTERNS,
    MissingModel,
    component_folder,
    transformer_source,
    whole_folder,
)


def main(words: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="zeroprior download",
        description="Download base models, and models that write captions, from the Hub into the "
        "model folder ($MODEL_VAULT), as ORG/NAME in the Hub's layout, so that training and "
        "generation need no network.",
    )
    parser.add_argument("names", nargs="+", metavar="NAME", help=", ".join((*BASES, *CAPTIONERS)))
    parser.add_argument(
        "--vault",
        default=os.environ.get("MODEL_VAULT"),
        help="the model folder, instead of $MODEL_VAULT",
    )
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    arguments = parser.parse_args(words)
    if not arguments.vault:
        parser.error("set MODEL_VAULT, or pass --vault FOLDER")
    try:
        for hub_id in hub_ids(arguments.names):
            fetch(hub_id, Path(arguments.vault).expanduser())
    except (UnknownBase, MissingModel) as error:
        if arguments.debug:
            raise
        sys.exit(f"error: {error}")


def hub_ids(names: list[str]) -> list[str]:
    """The repositories that the names need, training adapters included, each once.

    Names are those of base models and of models that write captions.
    """
    wanted: dict[str, None] = {}
    for name in names:
        if name in CAPTIONERS:
            wanted[CAPTIONERS[name].hub_id] = None
            continue
        base = find_base(name)
        for part in (base, base.completed_by, *base.training_adapters.values()):
            if part is not None and part.included is None:
                wanted[part.hub_id] = None
    return list(wanted)


def fetch(hub_id: str, model_folder: Path) -> Path:
    """Downloads one repository into the model folder; existing files are not downloaded again.

    Raises `MissingModel` if the Hub cannot be reached or the repository is incomplete.
    """
    from huggingface_hub import snapshot_download

    folder, row = model_folder / hub_id, by_hub_id(hub_id)
    captioner = next((each for each in CAPTIONERS.values() if each.hub_id == hub_id), None)
    revision = captioner.revision if captioner is not None else None
    patterns = VAULT_PATTERNS if captioner is None else MODEL_PATTERNS
    known = captioner or row
    size = f" ({known.download:g} GB)" if known is not None and known.download else ""
    print(f"{hub_id}{size} -> {folder}")
    if row is not None and row.terms is not None:
        print(f"{row.license}: {row.terms.notice} {row.terms.url}")
    try:
        snapshot_download(hub_id, revision=revision, local_dir=folder, allow_patterns=patterns)
    except Exception as error:
        raise MissingModel(
            f"{hub_id} could not be downloaded from the Hub ({type(error).__name__}: {error})"
        ) from error
    # Without a network, the Hub's client accepts an incomplete folder.
    if captioner is not None:
        return whole_folder(folder, weights=True)
    if row is None:  # a training adapter's
        if not any(folder.glob("*.safetensors")):
            raise MissingModel(f"{folder} contains no .safetensors; download it again")
        return folder
    base = replace(row, hub_id=str(folder), folder=folder)
    transformer_source(base)
    for component in () if base.completed_by else (*COMPONENTS, family_of(base).tokenizer_folder):
        component_folder(base, component)
    return folder


if __name__ == "__main__":
    main()
