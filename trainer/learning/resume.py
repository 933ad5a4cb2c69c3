"""Resumes a run from a checkpoint, or continues training finished weights."""

import hashlib
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from adapters.archive import Archive, BrokenArchive, read_archive
from adapters.formats import rank_of
from adapters.lora import Lora
from adapters.placeholder import Placeholder
from families.few_steps import find_few_step_lora
from families.registry import UnknownBase, find_base
from families.without_weights import family_without_weights
from trainer.data import Example
from trainer.learning.checkpoint import (
    BrokenCheckpoint,
    Checkpoint,
    is_checkpoint,
    latest,
    read_checkpoint,
    read_header,
)
from trainer.learning.distributed import processes
from trainer.learning.optimizers import fresh_state, rows_optimizer
from trainer.settings import Settings, SettingsError, extent_of

log = logging.getLogger(__name__)

NAME_LETTERS = 120  # of an image's name in a checkpoint


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
    return {
        "base_model": settings.base.hub_id,
        "rank": settings.rank,
        "placeholder_token": settings.subject,
        "lora_targets": settings.lora_targets,
        "optimizer": settings.optimizer,
    }


def data_identity(examples: Sequence[Example]) -> dict[str, list[str]]:
    """Hashes of each image and its caption, by the image's name."""
    return {
        _short(each.name): [
            hashlib.blake2b(content, digest_size=8).hexdigest()
            for content in (each.data, each.caption.encode())
        ]
        for each in examples
    }


def _short(name: str) -> str:
    """The name, shortened with a hash if it is long, to limit the header of a checkpoint."""
    if len(name) <= NAME_LETTERS:
        return name
    return f"{name[:NAME_LETTERS]} {hashlib.blake2b(name.encode(), digest_size=8).hexdigest()}"


def continue_weights(archive: Archive, lora: Lora, placeholder: Placeholder | None) -> None:
    """Loads finished weights instead of the random initialization."""
    lora.load(archive.factors)
    if placeholder is not None and archive.placeholder is not None:
        with torch.no_grad():
            placeholder.vectors.copy_(archive.placeholder.vectors)


def _check_checkpoint(checkpoint: Checkpoint, settings: Settings, path: Path) -> None:
    for name, wanted in identity(settings).items():
        found = checkpoint.identity.get(name)
        if found != wanted:
            raise SettingsError(
                f"resume_from: {path} has {name} {found!r}, but this run has {wanted!r}; "
                f"set {name} to {found!r}, or start a new run"
            )
    if checkpoint.step > settings.steps:
        raise SettingsError(
            f"resume_from: {path} has {checkpoint.step} steps done, but this run has "
            f"{settings.steps}; set steps to {checkpoint.step} or more"
        )
    _check_state(checkpoint, settings, path)
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
    captions = sum(1 for name, hashes in now.items() if name in then and then[name][1] != hashes[1])
    log.warning(
        "resuming with a changed dataset: %d images added, %d removed, %d captions changed",
        *(len(images - before), len(before - images), captions),
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
        "ema_decay",
        "quantize",
        "turbo_adapter",
        "preserve",
    )
    facts = {name: getattr(settings, name) for name in names} | {
        "resolutions": list(settings.resolutions),
        "processes": processes().num_processes,
        "validation": settings.validation_every != 0,  # it may hold out images
        "validation_images": settings.validation_images,
    }
    if settings.preserve:  # the number of images may depend on the steps
        facts["preserve_prompts"] = list(settings.preserve_prompts)
        facts["preservation_images"] = extent_of(settings).images
    if settings.lr_scheduler != "constant":
        facts["steps"] = settings.steps  # other schedules depend on it
    return facts


def _check_archive(archive: Archive, settings: Settings, path: Path) -> None:
    rank = rank_of(archive.factors)
    if rank != settings.rank:
        raise SettingsError(
            f"resume_from: {path} has rank {rank}, but this run has {settings.rank}; set rank to "
            f"{rank}"
        )
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
    token = archive.placeholder.token if archive.placeholder else None
    if token is not None and token != settings.subject:
        raise SettingsError(
            f"resume_from: {path} was trained with the placeholder {token!r}, but this run "
            f"has {settings.subject!r}; set placeholder_token to {token!r}"
        )
    shapes = _trained_shapes(settings)
    found = {
        name: (tuple(down.shape), tuple(up.shape)) for name, (down, up) in archive.factors.items()
    }
    wanted = dict(shapes.lora)
    if found.keys() != wanted.keys():
        more, fewer = sorted(found.keys() - wanted.keys()), sorted(wanted.keys() - found.keys())
        lines = [f"{len(more)} that this run does not train ({more[0]}, …)"] if more else []
        lines += [f"not {len(fewer)} that it trains ({fewer[0]}, …)"] if fewer else []
        raise SettingsError(
            f"resume_from: {path} contains other layers than lora_targets "
            f"{settings.lora_targets!r} of {settings.base.name}: {' and '.join(lines)}"
        )
    for name, shape in wanted.items():
        if found[name] != shape:
            raise SettingsError(
                f"resume_from: {path} has shapes {found[name]} for {name}, and "
                f"{settings.base.name} needs {shape}; it was trained on another model"
            )
    rows = archive.placeholder.vectors.shape if archive.placeholder else None
    if rows is not None and tuple(rows) != shapes.rows:
        raise SettingsError(
            f"resume_from: {path} has a placeholder of shape {tuple(rows)}, and "
            f"{settings.base.name} needs {shapes.rows}; it was trained on another model"
        )


# ---- Shapes of trained weights -------------------------------------------------------------------


@dataclass(frozen=True)
class Shapes:
    """The shapes of a run's trained weights, computed without loading its base model."""

    lora: list[tuple[str, tuple[tuple[int, int], tuple[int, int]]]]  # of A and B, in order
    rows: tuple[int, int]  # of the placeholder


def _trained_shapes(settings: Settings) -> Shapes:
    """By the model's structure only. Raises `SettingsError` for wrong `lora_targets`."""
    family = family_without_weights(settings.base)
    try:
        targets = set(family.lora_targets(settings.lora_targets))
    except ValueError as error:
        raise SettingsError(str(error)) from error
    lora = [
        (name, ((settings.rank, module.in_features), (module.out_features, settings.rank)))
        for name, module in family.transformer.named_modules()
        if name in targets
    ]
    width = family.text_encoder.get_input_embeddings().weight.shape[1]
    return Shapes(lora, (1, width))


def _check_state(checkpoint: Checkpoint, settings: Settings, path: Path) -> None:
    """Checks the tensors' shapes against this run's LoRA, placeholder and optimizer."""
    shapes = _trained_shapes(settings)
    wanted: dict[str, tuple[int, ...]] = {}
    for number, (_, pair) in enumerate(shapes.lora):
        wanted |= {f"lora.{2 * number + k}": shape for k, shape in enumerate(pair)}
    if settings.subject is not None:
        wanted["placeholder.0"] = shapes.rows
    found = {name: tuple(value.shape) for name, value in checkpoint.parameters.items()}
    for name in sorted(found.keys() | wanted.keys()):
        if found.get(name) != wanted.get(name):
            shape = found.get(name, "nothing")
            raise SettingsError(
                f"resume_from: {path} is of another model: parameters {name} has shape {shape}, "
                f"and {settings.base.name} needs {wanted.get(name, 'nothing')}"
            )
    kinds = {"lora": settings.optimizer, "placeholder": rows_optimizer(settings.optimizer)}
    for name, state in checkpoint.optimizers.items():
        options = state["param_groups"][0] | {"params": []}
        right = fresh_state(kinds[name], shapes.rows)["param_groups"][0] | {"params": []}
        faults = [unlike(options, right, f"optimizers.{name}.param_groups[0]")]
        for number, values in state["state"].items():
            shape, part = found[f"{name}.{number}"], f"optimizers.{name}.state[{number}]"
            rights = [fresh_state(kinds[name], shape, start)["state"][0] for start in (0.0, 1.0)]
            unlikes = [unlike(values, right, part) for right in rights]
            faults.append(unlikes[1] if all(unlikes) else None)
        fault = next(filter(None, faults), None)
        if fault is not None:
            raise SettingsError(f"resume_from: {path} is damaged: {fault}")


def unlike(found: Any, right: Any, part: str) -> str | None:
    """How a part of an optimizer's state differs in structure from a valid one, or None.

    Tensors must have equal shapes and dtypes, dictionaries equal keys, other values equal types.
    """
    if isinstance(right, Tensor):
        if not isinstance(found, Tensor):
            return f"{part} is not a tensor"
        if (found.shape, found.dtype) != (right.shape, right.dtype):
            shapes = [f"{tuple(each.shape)} of {each.dtype}" for each in (found, right)]
            return f"{part} has shape {shapes[0]}, not {shapes[1]}"
        return None
    if isinstance(right, dict):
        if not isinstance(found, dict) or found.keys() != right.keys():
            return f"{part} does not contain {', '.join(map(str, right))}"
        parts = ((found[key], right[key], f"{part}.{key}") for key in right)
    elif isinstance(right, (list, tuple)):
        if not isinstance(found, list) or len(found) != len(right):
            return f"{part} is not a list of {len(right)} values"
        parts = ((found[k], each, f"{part}[{k}]") for k, each in enumerate(right))
    else:
        numbers = [isinstance(each, (int, float)) for each in (found, right)]
        same = all(numbers) or type(found) is type(right)
        return None if same else f"{part} is not like {right!r}"
    return next((fault for each in parts if (fault := unlike(*each))), None)
