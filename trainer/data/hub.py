"""Downloads a dataset of the Hub: its images with captions and tables, or its one archive.

Only for datasets that the user of this machine names. Files are in the Hub's cache (`$HF_HOME`), so
nothing is downloaded twice, and an interrupted download is continued.
"""

import logging
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from trainer.data.dataset import DatasetError
from trainer.data.members import (
    CAPTION_SUFFIXES,
    IMAGE_SUFFIXES,
    MAX_MEMBERS,
    MAX_TOTAL_BYTES,
    TABLE_SUFFIXES,
    listed,
    printable,
    suffix_of,
)
from trainer.dataset_names import PACKED_SUFFIXES, HubDataset, hub_dataset
from trainer.settings import Secret, hidden

log = logging.getLogger(__name__)
log.setLevel(logging.INFO)  # also where only warnings are shown: a download may take minutes

_PARQUET = (".parquet", ".arrow")
_USED = (*sorted(IMAGE_SUFFIXES), *CAPTION_SUFFIXES, *TABLE_SUFFIXES)


def local_dataset(given: Path) -> Path:
    """The dataset on this machine: as given, or downloaded if it is one of the Hub.

    given: a path, or `hub:owner/name` or `owner/name` with `@revision` or not
        (`trainer.dataset_names`).

    Returns the snapshot's folder in the Hub's cache, or its archive. Raises DatasetError that says
    what to do.
    """
    wanted = hub_dataset(given)
    if wanted is None:
        if str(given).startswith("hub:") and not os.path.exists(given):
            raise DatasetError(
                f"{printable(str(given)[:200])} is not the name of a dataset on the Hub; write "
                "hub:owner/name, or hub:owner/name@revision"
            )
        return given
    from huggingface_hub import get_token

    try:
        return _download(wanted)
    except DatasetError:
        raise
    except Exception as error:
        token = Secret.of(get_token())
        raise DatasetError(hidden(_reason(wanted, error), token)) from error


def _download(wanted: HubDataset) -> Path:
    """The snapshot's folder, or its archive. Raises DatasetError and whatever the Hub's client
    raises."""
    from huggingface_hub import HfApi, get_cached_repo_tree, snapshot_download

    asked: dict[str, Any] = {"repo_id": wanted.id, "repo_type": "dataset"}
    asked["revision"] = wanted.revision
    try:
        info = HfApi().dataset_info(wanted.id, revision=wanted.revision, files_metadata=True)
        sizes = {each.rfilename: each.size or 0 for each in info.siblings or ()}
    except Exception as error:
        if _is_final(error):
            raise
        try:
            sizes = {each.path: each.size for each in get_cached_repo_tree(**asked)}
        except Exception:
            raise error from None
        log.warning("%s: the Hub cannot be reached; using the downloaded files", wanted.shown)
    used = _used(wanted, sizes)
    total = sum(sizes[name] for name in used)
    if total > MAX_TOTAL_BYTES or len(used) > MAX_MEMBERS:
        raise DatasetError(
            f"{wanted.shown} has {len(used):,} files of {_mb(total)}, more than the limits of "
            f"{MAX_MEMBERS:,} files and {_mb(MAX_TOTAL_BYTES)}; download a part of it, and give "
            "that folder"
        )
    others = sorted({suffix_of(name) or name for name in sizes.keys() - set(used)})
    log.info(
        "%s: %s files, %s; what is in the cache is not downloaded again%s",
        *(wanted.shown, f"{len(used):,}", _mb(total)),
        f". Not used: {listed(others)}" if others else "",
    )
    suffixes = dict.fromkeys(map(suffix_of, used))
    folder = Path(snapshot_download(**asked, allow_patterns=_patterns(suffixes)))
    archive = [name for name in used if suffix_of(name) in PACKED_SUFFIXES]
    return folder / archive[0] if archive else folder


def _used(wanted: HubDataset, sizes: Mapping[str, int]) -> Sequence[str]:
    """The files of a repository to download: of images, archives and Parquet what has most bytes.

    A repository of archives may have a sample image for its page, for example.
    """
    kinds = [IMAGE_SUFFIXES, PACKED_SUFFIXES, _PARQUET]
    found = [[name for name in sorted(sizes) if suffix_of(name) in kind] for kind in kinds]
    images, archives, parquet = found
    most = max(found, key=lambda names: sum(sizes[name] for name in names))
    if not most:
        names = listed(sorted(sizes)) or "it is empty"
        raise DatasetError(f"{wanted.shown} contains no images ({names})")
    if most is parquet:
        raise DatasetError(
            f"{wanted.shown} has its images in Parquet files, which are not read: "
            f"{listed(parquet, 3)}; save them as image files, with the few lines in "
            "docs/datasets.md, and give that folder"
        )
    if most is images:
        return [name for name in sorted(sizes) if suffix_of(name) in _USED]
    if len(archives) > 1:
        raise DatasetError(
            f"{wanted.shown} has {len(archives)} archives: {listed(archives, 5)}; download one "
            f"(hf download {wanted.id} {archives[0]} --repo-type dataset) and give that file"
        )
    return archives


def _is_final(error: Exception) -> bool:
    """Whether the Hub has answered, so that there is no sense in using old files."""
    from huggingface_hub.errors import HfHubHTTPError

    if isinstance(error, HfHubHTTPError):
        return error.response.status_code < 500
    return isinstance(error, ValueError)


def _reason(wanted: HubDataset, error: Exception) -> str:
    """What went wrong, and what to do."""
    from huggingface_hub import constants
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError
    from huggingface_hub.errors import RevisionNotFoundError as NoRevision

    name = wanted.shown
    if not wanted.explicit:
        name = f"{wanted.id} does not exist here, and as a dataset of the Hub {name}"
    if isinstance(error, GatedRepoError):
        page = f"{constants.ENDPOINT}/datasets/{wanted.id}"
        return f"{name} is gated; accept its conditions on {page}, and set HF_TOKEN"
    if isinstance(error, RepositoryNotFoundError):
        return f"{name} was not found; correct the name, or set HF_TOKEN if it is private"
    if isinstance(error, NoRevision):
        return f"{name}: there is no revision {wanted.revision}; correct it, or leave it out"
    if constants.HF_HUB_OFFLINE:
        return f"{name} is not downloaded, or not completely; unset HF_HUB_OFFLINE to do so"
    cause = " ".join(f"{type(error).__name__}: {error}".split())[:500]
    return (
        f"{name} could not be downloaded ({cause}); repeat the command to continue, or give a "
        "folder or an archive"
    )


def _patterns(suffixes: Iterable[str]) -> list[str]:
    """Patterns of file names for these suffixes in upper and lower case."""
    return [
        "*" + "".join(f"[{c}{c.upper()}]" if c.isalpha() else c for c in suffix)
        for suffix in suffixes
    ]


def _mb(size: int) -> str:
    return f"{size / 1e6:,.1f} MB"
