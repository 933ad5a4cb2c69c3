"""Going on from an earlier training: a checkpoint's whole state, or finished weights."""

import logging
from pathlib import Path

import torch

from adapters.archive import Archive, BrokenArchive, read_archive
from adapters.factors import rank_of
from adapters.lora import Lora
from adapters.placeholder import Placeholder
from families.bases import find_base
from trainer.checkpoint import BrokenCheckpoint, Checkpoint, is_checkpoint, latest, read_checkpoint
from trainer.settings import Settings, SettingsError

log = logging.getLogger(__name__)


def read_resume(settings: Settings) -> Checkpoint | Archive | None:
    """What `resume_from` names, checked against the settings before a model is loaded.

    A folder stands for the newest checkpoint in it. Raises `SettingsError` for a file that is
    broken or belongs to another base, rank or placeholder.
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
        "turbo_adapter",
    )
    return {name: getattr(settings, name) for name in names} | {
        "resolutions": list(settings.resolutions)
    }


def _check_archive(archive: Archive, settings: Settings, path: Path) -> None:
    rank = rank_of(archive.factors)
    if rank != settings.rank:
        raise SettingsError(
            f"resume_from: {path} has rank {rank}, this training {settings.rank}; "
            f"set rank to {rank}"
        )
    if archive.base_model and find_base(archive.base_model).family != settings.base.family:
        raise SettingsError(
            f"resume_from: {path} was trained on {archive.base_model}, "
            f"not on {settings.base.hub_id}"
        )
    token = archive.placeholder.token if archive.placeholder else None
    if token is not None and token != settings.subject:
        raise SettingsError(
            f"resume_from: {path} was trained with the placeholder {token!r}, this training "
            f"has {settings.subject!r}; set placeholder_token to {token!r}"
        )
