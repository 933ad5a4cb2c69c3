"""Resumes a run from a checkpoint, or continues training finished weights."""

import hashlib
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from adapters.archive import Archive, BrokenArchive, read_archive
from adapters.formats import as_delta
from adapters.forms import Form
from adapters.lora import Lora
from adapters.placeholder import Placeholder
from families.few_steps import find_few_step_lora
from families.registry import UnknownBase, find_base
from trainer.data import Content, Example
from trainer.learning.checkpoint import (
    BrokenCheckpoint,
    Checkpoint,
    is_checkpoint,
    latest,
    read_checkpoint,
    read_header,
)
from trainer.learning.distributed import processes
from trainer.learning.resumed_state import check_state, trained_shapes
from trainer.settings import Settings, SettingsError, extent_of, first_step

log = logging.getLogger(__name__)

NAME_LETTERS = 120  # of an image's name in a checkpoint
SUBJECTS = "subjects"  # in the identity of runs with several
TRAINING = "training"  # in the identity of full trainings


def read_resume(settings: Settings, examples: Sequence[Example]) -> Checkpoint | Archive | None:
    """Reads `resume_from` and checks it against settings and data, before a model is loaded.

    For a folder, reads its newest checkpoint. Raises `SettingsError` for a file that is damaged or
    belongs to another base, rank, placeholder, optimizer or dataset.
    """
    if settings.resume_from is None:
        return None
    path = settings.resume_from
    if path.is_dir():
        newest = latest(path)
        if newest is None:
            raise SettingsError(f"resume_from: {path} contains no checkpoint (step-*.safetensors)")
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
        if settings.full:
            raise SettingsError(
                f"resume_from: {path} is not a checkpoint; a full training resumes from one. To "
                "train the result of another further, name its folder in base_model"
            )
        archive = read_archive(path)
        _check_archive(archive, settings, path)
        few_steps = find_few_step_lora(archive.names)
        if few_steps is not None:
            log.warning(
                "resume_from: %s is %s, a few-step LoRA; training on top of it destroys the "
                "%d-step quality. Train a separate LoRA and load both when generating",
                *(path.name, few_steps.name, few_steps.steps),
            )
        log.info(
            "continuing the weights of %s, with a fresh optimizer and %d new steps",
            path,
            settings.steps,
        )
        return archive
    except (BrokenCheckpoint, BrokenArchive) as error:
        raise SettingsError(f"resume_from: {error}") from error
    except OSError as error:
        raise SettingsError(f"resume_from: {path} cannot be read ({error})") from error


def with_seed(settings: Settings) -> Settings:
    """The settings with the seed of the checkpoint that they resume from, if none is set.

    Raises `SettingsError` for a broken checkpoint.
    """
    path = settings.resume_from
    if path is None or not settings.seed_is_random:
        return settings
    checkpoint = latest(path) if path.is_dir() else path
    if checkpoint is None or not is_checkpoint(checkpoint):
        return settings
    try:
        seed = read_header(checkpoint)["identity"].get("settings", {}).get("seed")
    except BrokenCheckpoint as error:
        raise SettingsError(f"resume_from: {error}") from error
    return settings if seed is None else settings.replace(seed=seed)


def identity(settings: Settings) -> dict[str, object]:
    """The settings that must be equal to resume a run."""
    facts: dict[str, object] = {
        "base_model": settings.base.hub_id,
        **({TRAINING: settings.training} if settings.full else settings.form.facts),
        "placeholder_token": settings.subject,
        "lora_targets": settings.lora_targets,
        "optimizer": settings.optimizer,
    }
    return facts | ({SUBJECTS: list(settings.tokens)} if len(settings.tokens) > 1 else {})


def data_identity(examples: Sequence[Example]) -> dict[str, list[str]]:
    """Hashes of each image, its caption, its mask and its control images, by the image's name.

    The last only with control images, the third only with these or a mask that is used.
    """
    return {_short(each.name): _hashes(each) for each in examples}


def _hashes(example: Example) -> list[str]:
    contents = [example.data, "\0".join(example.captions).encode()]
    if example.mask_file or example.controls:
        contents.append(example.mask)
    if example.controls:
        contents.append("".join(_hash(each.data) for each in example.controls).encode())
    return [_hash(each) for each in contents]


def _hash(content: Content) -> str:
    return hashlib.blake2b(content, digest_size=8).hexdigest()


def _short(name: str) -> str:
    """The name, shortened with a hash if it is long, to limit the header of a checkpoint."""
    if len(name) <= NAME_LETTERS:
        return name
    return f"{name[:NAME_LETTERS]} {hashlib.blake2b(name.encode(), digest_size=8).hexdigest()}"


def continue_weights(archive: Archive, lora: Lora, placeholders: Sequence[Placeholder]) -> None:
    """Loads finished weights instead of the random initialization."""
    lora.load(archive.deltas)
    with torch.no_grad():
        for each in placeholders:
            if each.token in archive.vectors:
                each.vectors.copy_(archive.vectors[each.token])


def _check_checkpoint(checkpoint: Checkpoint, settings: Settings, path: Path) -> None:
    sometimes = (SUBJECTS, TRAINING, *Form("lokr", 1).facts)
    for name, wanted in (dict.fromkeys(sometimes) | identity(settings)).items():
        found = checkpoint.identity.get(name)
        if found != wanted:
            remedy = f"remove {name}" if found is None else f"set {name} to {found!r}"
            raise SettingsError(
                f"resume_from: {path} has {name} {found!r}, but this run has {wanted!r}; "
                f"{remedy}, or start a new run"
            )
    if checkpoint.step > settings.steps:
        raise SettingsError(
            f"resume_from: {path} has {checkpoint.step} steps done, but this run has "
            f"{settings.steps}; set steps to {checkpoint.step} or more"
        )
    check_state(checkpoint, settings, path)
    then, now = checkpoint.identity.get("settings", {}), exactness(settings)
    changed = [
        f"{name} {then[name]!r} -> {value!r}"
        for name, value in now.items()
        if name in then and then[name] != value
    ]
    if changed:
        log.warning("resuming with changed settings: %s", ", ".join(changed))


def _check_data(then: dict[str, list[str]], now: dict[str, list[str]], path: Path) -> None:
    """Raises `SettingsError` for a dataset without any image of the checkpoint's; warns of changes.

    Better captions and more images are good reasons to resume with other data; a completely
    different dataset is most likely a mistake.
    """
    if then == now:
        return
    before, images = ({hashes[0] for hashes in each.values()} for each in (then, now))
    if not before & images:
        raise SettingsError(
            f"resume_from: {path} was trained on other images, and this dataset contains none of "
            "them; pass the dataset of that run, or continue its weights.zip"
        )
    both = [(then[name], hashes) for name, hashes in now.items() if name in then]
    parts = {"captions": slice(1, 2), "masks": slice(2, 3), "control images": slice(3, 4)}
    changed = {what: sum(a[part] != b[part] for a, b in both) for what, part in parts.items()}
    log.warning(
        "resuming with a changed dataset: %d images added, %d removed%s",
        *(len(images - before), len(before - images)),
        "".join(
            f", {count} {what} changed"
            for what, count in changed.items()
            if count or what == "captions"
        ),
    )


def exactness(settings: Settings) -> dict[str, object]:
    """Settings that must also be equal for a resumed run to be bit-identical."""
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
        "horizontal_flip",
        "keep_transparency",
        "crop_jitter",
        "ema_decay",
        "quantize",
        "turbo_adapter",
        "preserve",
        "keep_best",
        "early_stopping",
    )
    facts = {name: getattr(settings, name) for name in names} | {
        "resolutions": list(settings.resolutions),
        "processes": processes().num_processes,
        "validation": settings.validation_every != 0,  # it may hold out images
        "validation_images": settings.validation_images,
    }
    if settings.preserve:  # the number of images may depend on the steps
        facts["preserve_prompts"] = list(settings.preserve_prompts)
        extent = extent_of(settings)
        facts["preservation_images"] = [extent.images, extent.subject_images]
        facts["preservation_begins"] = first_step(settings)
    if settings.lr_scheduler != "constant" or settings.by_validation:
        facts["steps"] = settings.steps  # schedules and measurements depend on it
    return facts


def _check_archive(archive: Archive, settings: Settings, path: Path) -> None:
    named = archive.base_model
    if named and named != settings.base.hub_id:  # equal if both are the name of a folder
        try:
            family = find_base(named).family
        except UnknownBase as error:
            raise SettingsError(f"resume_from: {path}: {error}") from error
        if family != settings.base.family:
            raise SettingsError(
                f"resume_from: {path} was trained on {named}, not on {settings.base.hub_id}"
            )
    if archive.tokens and archive.tokens != settings.tokens:
        theirs, ours = (" and ".join(map(repr, e)) for e in (archive.tokens, settings.tokens))
        name = "subjects" if len(archive.tokens) > 1 else "placeholder_token"
        raise SettingsError(
            f"resume_from: {path} was trained with the placeholder {theirs}, but this run has "
            f"{ours or None}; set {name} to {','.join(archive.tokens)!r}"
        )
    shapes = trained_shapes(settings)
    found = {
        name: {part: tuple(each.shape) for part, each in as_delta(delta).parts().items()}
        for name, delta in archive.deltas.items()
    }
    if found.keys() != shapes.lora.keys():
        more, fewer = sorted(found.keys() - shapes.lora), sorted(shapes.lora.keys() - found)
        lines = [f"{len(more)} that this run does not train ({more[0]}, …)"] if more else []
        lines += [f"not {len(fewer)} that it trains ({fewer[0]}, …)"] if fewer else []
        raise SettingsError(
            f"resume_from: {path} contains other layers than lora_targets "
            f"{settings.lora_targets!r} of {settings.base.name}: {' and '.join(lines)}"
        )
    for name, wanted in shapes.lora.items():
        if found[name] != wanted:
            raise SettingsError(
                f"resume_from: {path} has {_shown(found[name])} in {name}, and {settings.form} on "
                f"{settings.base.name} needs {_shown(wanted)}; set adapter, rank and lokr_factor "
                "as in the run that made it, on the same base model"
            )
    for rows in {tuple(each.shape) for each in archive.vectors.values()} - {shapes.rows}:
        raise SettingsError(
            f"resume_from: {path} has a placeholder of shape {rows}, and {settings.base.name} "
            f"needs {shapes.rows}; it was trained on another model"
        )


def _shown(shapes: Mapping[str, tuple[int, ...]]) -> str:
    return ", ".join(f"{part} {'x'.join(map(str, shape))}" for part, shape in shapes.items())
