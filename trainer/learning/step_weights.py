"""Writes usable weights next to the checkpoints: LoRA and token after a step.

checkpoints/step-000500.zip   a small weights.zip, next to step-000500.safetensors. The checkpoint
                              is for resuming; this is for generation.
saved/step-000500.zip         the same when a command asks for it (`trainer.learning.control`); of a
                              full training saved/step-000500/, a whole transformer
"""

import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

from adapters.archive import Archive, write_archive
from adapters.files.atomic import check_space
from adapters.trained_model import write_trained_model
from families.registry import trained_from
from trainer.run_files import CHECKPOINT, STEP_WEIGHTS, files_by_step
from trainer.settings import Settings

if TYPE_CHECKING:
    from trainer.learning.loop import Loop

log = logging.getLogger(__name__)

KEPT = 10  # in addition to those next to a checkpoint: one for each tenth of a run


def describe_weights(settings: Settings) -> dict[str, Any]:
    """The metadata that generation needs."""
    # The result of a full training replaces the transformer of the one that it began with.
    base = trained_from(settings.base) if settings.full else settings.base
    meta: dict[str, Any] = {
        "base_model": base.hub_id,
        "base_family": settings.base.family,  # for a base that is a local folder
        "training_mode": settings.training_mode,
        "train_placeholder_token": settings.train_placeholder_token,
        **({"trained": settings.training} if settings.full else settings.form.facts),
        "steps": settings.steps,
        **settings.base.license_facts,
    }
    if settings.subject is not None:
        meta["placeholder_token"] = settings.subject
    if len(settings.tokens) > 1:
        meta["placeholder_tokens"] = list(settings.tokens)
    return meta


def write_weights_of_step(loop: "Loop", folder: Path) -> Path:
    """Writes `step-NNNNNN.zip` with what would be saved as weights now (EMA if there is one).

    Of a full training it is the folder `step-NNNNNN`. Raises OSError, before anything is written,
    if the disk has too little space for it.
    """
    path = folder / f"step-{loop.done:06d}"
    meta = describe_weights(loop.settings) | {"steps": loop.done}
    deltas, placeholders = loop.final_weights()
    if loop.full is not None:
        check_space(path, loop.full.nbytes())
        write_trained_model(loop.full.transformer, placeholders, meta, path)
    else:
        path = path.with_suffix(".zip")
        write_archive(Archive(deltas, placeholders, meta), path)
    loop.events.emit("saved", **file_facts(loop.done, path))
    return path


def write_step_weights(loop: "Loop", folder: Path) -> None:
    """Writes the weights next to a checkpoint, and removes older ones.

    Never raises: the checkpoint, which has been written before, is more important.
    """
    try:
        write_weights_of_step(loop, folder)
        _remove_others(folder, loop.done)
    except Exception as error:
        log.warning("no weights of step %d in %s: %s", loop.done, folder, error)


def file_facts(step: int, path: Path) -> dict[str, Any]:
    """What an event says about a file, or a model's folder, in a folder of the run's folder."""
    file = f"{path.parent.name}/{path.name}"
    return {"step": step, "file": file, "bytes": size_of(path)}


def size_of(path: Path) -> int:
    """The bytes of a file, or of all files in a folder."""
    files = filter(Path.is_file, path.rglob("*")) if path.is_dir() else (path,)
    return sum(each.stat().st_size for each in files)


def _remove_others(folder: Path, step: int) -> None:
    """Removes weights of later steps, which a resumed run has discarded, and surplus weights.

    Keeps those next to a checkpoint, and `KEPT` others, spread evenly over the run. Other files,
    and links and their targets, are not removed.
    """
    if folder.is_symlink():
        return
    found = {k: file for k, file in files_by_step(folder, STEP_WEIGHTS) if not file.is_symlink()}
    checkpoints = {k for k, _ in files_by_step(folder, CHECKPOINT)}
    kept = spread([k for k in found if k <= step and k not in checkpoints], KEPT)
    for k, file in found.items():
        if k > step or not (k in checkpoints or k in kept):
            file.unlink(missing_ok=True)


def spread(steps: list[int], most: int) -> list[int]:
    """At most `most` of the steps, in order: repeatedly removes the one whose neighbors are closest
    to each other. Keeps the first and the last."""
    kept = sorted(steps)
    while len(kept) > max(2, most):
        gaps = [kept[k + 1] - kept[k - 1] for k in range(1, len(kept) - 1)]
        del kept[1 + gaps.index(min(gaps))]
    return kept
