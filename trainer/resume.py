"""Going on from an earlier training: a checkpoint's whole state, or finished weights."""

import hashlib
import logging
from collections.abc import Sequence
from pathlib import Path

import torch

from adapters.archive import Archive, BrokenArchive, read_archive
from adapters.factors import rank_of
from adapters.lora import Lora
from adapters.placeholder import Placeholder
from families.bases import UnknownBase, find_base
from trainer.checkpoint import BrokenCheckpoint, Checkpoint, is_checkpoint, latest, read_checkpoint
from trainer.dataset import Example
from trainer.distributed import processes
from trainer.settings import Settings, SettingsError

log = logging.getLogger(__name__)


def read_resume(settings: Settings, examples: Sequence[Example]) -> Checkpoint | Archive | None:
    """What `resume_from` names, checked against settings and data before a model is loaded.

    A folder stands for the newest checkpoint in it. Raises `SettingsError` for a file that is
    broken or belongs to another base, rank, placeholder, optimiser or dataset.
    """
    if settings.resume_from is None:
        return None
    path = settings.resume_from
    if path.is_dir():
        newest = latest(path)
        if newest is None:
            raise SettingsError(f"resume_from: {path} holds no checkpoint (step-*.safetensors)")
        path = newest
    if not path.is_file():
        raise SettingsError(f"resume_from: {path} does not exist")
    try:
        if is_checkpoint(path):
            checkpoint = read_checkpoint(path)
            _check_checkpoint(checkpoint, settings, path)
            _check_data(checkpoint.identity.get("data", {}), data_identity(examples), path)
            log.info("resuming from %s, after %d steps", path, checkpoint.step)
            return checkpoint
        archive = read_archive(path)
        _check_archive(archive, settings, path)
        log.info(
            "continuing the weights of %s, with a fresh optimiser and %d new steps",
            path,
            settings.steps,
        )
        return archive
    except (BrokenCheckpoint, BrokenArchive) as error:
        raise SettingsError(f"resume_from: {error}") from error


def identity(settings: Settings) -> dict[str, object]:
    """What two runs must have in common for one to go on from the other."""
    return {
        "base_model": settings.base.hub_id,
        "rank": settings.rank,
        "placeholder_token": settings.subject,
        "lora_targets": settings.lora_targets,
        "optimizer": settings.optimizer,
    }


def data_identity(examples: Sequence[Example]) -> dict[str, list[str]]:
    """A hash of the picture and one of the caption, by the picture's name."""
    return {
        each.name: [
            hashlib.blake2b(content, digest_size=8).hexdigest()
            for content in (each.data, each.caption.encode())
        ]
        for each in examples
    }


def continue_weights(archive: Archive, lora: Lora, placeholder: Placeholder | None) -> None:
    """Puts finished weights in the place of the random start."""
    lora.load(archive.factors)
    if placeholder is not None and archive.placeholder is not None:
        with torch.no_grad():
            placeholder.vectors.copy_(archive.placeholder.vectors)


def _check_checkpoint(checkpoint: Checkpoint, settings: Settings, path: Path) -> None:
    for name, wanted in identity(settings).items():
        found = checkpoint.identity.get(name)
        if found != wanted:
            raise SettingsError(
                f"resume_from: {path} has {name} {found!r}, this training {wanted!r}; "
                f"set {name} to {found!r}, or start anew"
            )
    if checkpoint.step >= settings.steps:
        raise SettingsError(
            f"resume_from: {path} has done {checkpoint.step} steps; "
            f"set steps above that (now {settings.steps})"
        )
    then, now = checkpoint.identity.get("settings", {}), exactness(settings)
    changed = [
        f"{name} {then[name]!r} -> {value!r}"
        for name, value in now.items()
        if name in then and then[name] != value
    ]
    if changed:
        log.warning("resuming with other settings than before: %s", ", ".join(changed))


def _check_data(then: dict[str, list[str]], now: dict[str, list[str]], path: Path) -> None:
    """Refuses a dataset without a single picture of the checkpoint's, warns of a changed one.

    Better captions and more pictures are good reasons to go on with other data; another dataset
    is most likely a mistake.
    """
    if then == now:
        return
    before, pictures = ({hashes[0] for hashes in each.values()} for each in (then, now))
    if not before & pictures:
        raise SettingsError(
            f"resume_from: {path} was trained on other pictures, of which this dataset holds none; "
            "give the dataset of that training, or continue its weights.zip"
        )
    captions = sum(1 for name, hashes in now.items() if name in then and then[name][1] != hashes[1])
    log.warning(
        "resuming with another dataset than before: %d pictures new, %d gone, %d captions changed",
        *(len(pictures - before), len(before - pictures), captions),
    )


def exactness(settings: Settings) -> dict[str, object]:
    """What must be equal, too, for a resumed run to equal an uninterrupted one bit for bit."""
    names = (
        "seed",
        "batch_size",
        "learning_rate",
        "placeholder_learning_rate",
        "caption_dropout",
        "lr_scheduler",
        "lr_warmup_steps",
        "weight_decay",
        "max_grad_norm",
        "training_shift",
        "timestep_sampling",
        "gradient_accumulation",
        "ema_decay",
        "quantize",
        "turbo_adapter",
    )
    facts = {name: getattr(settings, name) for name in names} | {
        "resolutions": list(settings.resolutions),
        "processes": processes().num_processes,
        "validation": settings.validation_every != 0,  # of many pictures it holds some out
    }
    if settings.lr_scheduler != "constant":
        facts["steps"] = settings.steps  # the others' end moves with it
    return facts


def _check_archive(archive: Archive, settings: Settings, path: Path) -> None:
    rank = rank_of(archive.factors)
    if rank != settings.rank:
        raise SettingsError(
            f"resume_from: {path} has rank {rank}, this training {settings.rank}; "
            f"set rank to {rank}"
        )
    named = archive.base_model
    if named and named != settings.base.hub_id:  # the same, where both are one folder's name
        try:
            family = find_base(named).family
        except UnknownBase as error:
            raise SettingsError(f"resume_from: {path}: {error}") from error
        if family != settings.base.family:
            raise SettingsError(
                f"resume_from: {path} was trained on {named}, not on {settings.base.hub_id}"
            )
    token = archive.placeholder.token if archive.placeholder else None
    if token is not None and token != settings.subject:
        raise SettingsError(
            f"resume_from: {path} was trained with the placeholder {token!r}, this training "
            f"has {settings.subject!r}; set placeholder_token to {token!r}"
        )
