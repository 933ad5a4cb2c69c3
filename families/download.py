"""python -m families.download NAME…: fills `$MODEL_VAULT` from the Hub."""

import argparse
import os
import sys
from pathlib import Path

from families.bases import BASES, Base, UnknownBase, by_hub_id, find_base
from families.repository import VAULT_PATTERNS


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m families.download",
        description="Fetch base models from the Hub into $MODEL_VAULT, as ORG/NAME in the Hub's "
        "own layout, so that training and drawing need no network afterwards.",
    )
    parser.add_argument("names", nargs="+", metavar="NAME", help=", ".join(BASES))
    parser.add_argument("--vault", default=os.environ.get("MODEL_VAULT"), help="in place of it")
    arguments = parser.parse_args()
    if not arguments.vault:
        parser.error("set MODEL_VAULT, or give --vault FOLDER")
    try:
        for hub_id in hub_ids(arguments.names):
            fetch(hub_id, Path(arguments.vault).expanduser())
    except UnknownBase as error:
        sys.exit(f"error: {error}")


def hub_ids(names: list[str]) -> list[str]:
    """The repositories that the named bases need, each once."""
    wanted: dict[str, None] = {}
    for name in names:
        base: Base | None = find_base(name)
        while base is not None:
            if base.folder is None:
                wanted[base.hub_id] = None
            base = by_hub_id(base.completed_by) if base.completed_by else None
    return list(wanted)


def fetch(hub_id: str, vault: Path) -> Path:
    """Downloads one repository into the vault; what is there already is not fetched again."""
    from huggingface_hub import snapshot_download

    folder = vault / hub_id
    print(f"{hub_id} -> {folder}")
    snapshot_download(hub_id, local_dir=folder, allow_patterns=VAULT_PATTERNS)
    return folder


if __name__ == "__main__":
    main()
