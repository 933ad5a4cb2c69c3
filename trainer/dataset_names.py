"""Names of datasets: ids of the Hub's datasets, suffixes of files, and names in messages."""

import os
import re
from pathlib import Path
from typing import NamedTuple

from families.redact import safe_name

_HUB = re.compile(
    r"(?P<prefix>hub:)?(?P<id>[A-Za-z0-9][A-Za-z0-9._-]{0,95}/[A-Za-z0-9._-]{1,96})"
    r"(?:@(?P<revision>[A-Za-z0-9][A-Za-z0-9._/-]{0,200}))?"
)
PACKED_SUFFIXES = (".zip", ".tar", ".tgz", ".gz")  # of archives that are read
LIST_SUFFIXES = (".jsonl", ".ndjson", ".csv", ".tsv")  # of lists of images (`data.file_lists`)
# Of files; a name like cats/imgs.zip is a path.
_SUFFIXES = (*PACKED_SUFFIXES, *LIST_SUFFIXES, ".json", ".txt")
_CACHED = re.compile(r"datasets--(?P<owner>.+?)--(?P<name>.+)")


class HubDataset(NamedTuple):
    """A dataset on the Hub."""

    id: str  # owner/name
    revision: str | None  # a branch, tag or commit; None: the newest
    explicit: bool  # written as hub:owner/name; else it could be a mistyped path

    @property
    def shown(self) -> str:
        """For messages, where a name with @ could be taken for one with a password."""
        return f"hub:{self.id}" + (f" (revision {self.revision})" if self.revision else "")


def hub_dataset(given: str | os.PathLike[str]) -> HubDataset | None:
    """The dataset on the Hub that `hub:owner/name` or `owner/name` means, with `@revision` or not.

    None for a path: `owner/name` is one if it exists or its folder `owner` does, or if it ends like
    a file.
    """
    text = os.fspath(given)
    match = _HUB.fullmatch(text)
    if match is None:
        return None
    explicit = match["prefix"] is not None
    if not explicit and (
        os.path.lexists(text)
        or os.path.lexists(match["id"].partition("/")[0])
        or match["id"].lower().endswith(_SUFFIXES)
    ):
        return None
    return HubDataset(match["id"], match["revision"], explicit)


def safe_source(given: str) -> str:
    """What the user gave as a dataset, with secrets in URLs removed, for messages."""
    found = hub_dataset(given)
    return found.shown if found is not None else safe_name(given)


def dataset_name(path: Path) -> str:
    """A dataset's name for messages: of its file or folder, or its id if it is from the Hub."""
    for folder, part in zip(path.parts[1:], path.parts, strict=False):
        if folder == "snapshots" and (match := _CACHED.fullmatch(part)):
            return f"{match['owner']}/{match['name']}"
    return path.name


def bare_name(path: Path) -> str:
    """A dataset's name without the suffixes of archives and lists, for names of other files."""
    name = dataset_name(path).replace("/", "--")
    while Path(name).suffix.lower() in (*PACKED_SUFFIXES, *LIST_SUFFIXES):
        name = Path(name).stem
    return name
