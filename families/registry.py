"""The known base models: registers those of every file in `families/models/`.

Does not import PyTorch, since settings, `--help` and messages need it.
"""

import difflib
import json
import logging
import os
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from pkgutil import iter_modules
from typing import Any

from families import models
from families.base import Base
from families.family import Family
from families.redact import safe_name
from families.repository import COMPONENTS

log = logging.getLogger(__name__)


class UnknownBase(ValueError):
    """A base model that is neither a known name nor a folder in the Hub's layout."""


FAMILIES: dict[str, type[Family]] = {}  # by `Family.name`
BASES: dict[str, Base] = {}  # by `Base.name`
_MAX_INDEX_BYTES = 1 << 20
_MAX_META_BYTES = 16 << 20
# `trained` in the meta.json of a folder with a whole transformer.
WHOLE_MODELS = FULL, BAKED = "full", "baked"


def register(family: type[Family]) -> None:
    """Registers a family and its base models. Raises ValueError for a name that is taken."""
    wrong = [base.name for base in family.bases if base.family != family.name]
    taken = [base.name for base in family.bases if base.name in BASES]
    if wrong or taken or family.name in FAMILIES:
        raise ValueError(
            f"{family.__module__}.{family.__name__}: the name of the family is {family.name!r}; "
            f"bases of another family: {wrong}; names that are taken: {taken}"
        )
    FAMILIES[family.name] = family
    BASES.update({base.name: base for base in family.bases})


def _register_all() -> None:
    """Registers the class of every file in `families/models/`."""
    for file in iter_modules(models.__path__):
        module = import_module(f"{models.__name__}.{file.name}")
        for value in vars(module).values():
            own = getattr(value, "__module__", None) == module.__name__  # not one that it imports
            if own and isinstance(value, type) and issubclass(value, Family):
                register(value)


_register_all()


def family_of(base: Base) -> type[Family]:
    """The base's family, as a class."""
    return FAMILIES[base.family]


def undistilled(family: type[Family]) -> Base:
    """The base whose defaults are used for an unknown fine-tune of the family."""
    return next(base for base in family.bases if not base.distilled)


def trainable() -> dict[str, Base]:
    """The bases that can be trained on single images: all but those that only edit."""
    return {name: base for name, base in BASES.items() if not base.needs_references}


def editing() -> dict[str, Base]:
    """The bases that take reference images."""
    return {name: base for name, base in BASES.items() if base.most_references}


def find_base(name: str) -> Base:
    """The base of a short name or a Hub id. Raises `UnknownBase`.

    For names from files: a weights file from an untrusted user cannot name a folder.
    """
    known = BASES.get(name) or by_hub_id(name)
    if known is None:
        raise UnknownBase(
            f"base_model {_shown(name)} is not one of {', '.join(BASES)}{_hint(name)}"
        )
    return known


def find_base_or_folder(name: str) -> Base:
    """The base that a user names: as `find_base`, or a local folder in the Hub's layout, or one
    that a full training or `adapters bake` wrote.

    A folder gets the defaults of the published model whose name it has (`…/Z-Image-Turbo`), or
    that its model_index.json names as its origin (`_name_or_path`, as diffusers writes it); any
    other folder those of its family's undistilled model, or of the one with a fixed schedule if it
    has one. Components that it lacks are taken from its origin. Raises `UnknownBase`.
    """
    known = BASES.get(name) or by_hub_id(name)
    if known is not None:
        return known
    try:
        folder = Path(name).expanduser().absolute()
        if (meta := meta_of_full_training(folder)) is not None:
            return _of_full_training(folder, meta)
        text = (folder / "model_index.json").read_bytes()[:_MAX_INDEX_BYTES]
    except (OSError, ValueError, RuntimeError):  # not found, not a path, "~" of an unknown user
        raise UnknownBase(
            f"base_model {_shown(name)} is neither one of {', '.join(BASES)} nor a folder with a "
            f"model_index.json{_hint(name)}"
        ) from None
    family, editing_model, origin, sigmas = _read_index(text, f"{_shown(name)}: model_index.json")
    by_folder_name = {base.hub_id.split("/")[1]: base for base in BASES.values()}
    published = by_folder_name.get(folder.name)
    if published is not None:  # a copy of a published model: its weights.zip works anywhere
        return replace(published, folder=folder)
    like = origin or undistilled(family)
    if editing_model and not like.needs_references:
        like = next(base for base in family.bases if base.needs_references)
    if sigmas:
        like = next((base for base in (like, *family.bases) if base.sample_sigmas), like)
        like = replace(like, sample_sigmas=sigmas, inference_steps=len(sigmas))
    # Only the name, not the path, since it is written into files that users share.
    like = replace(like, name=folder.name, hub_id=folder.name)
    components = (*COMPONENTS, family.tokenizer_folder)
    if origin is not None and not all((folder / each).is_dir() for each in components):
        like = replace(like, completed_by=origin)
    return replace(like, folder=folder, license="", download=None)


def meta_of_full_training(folder: Path) -> dict[str, Any] | None:
    """The meta.json of a folder that a full training wrote, or `adapters bake` in the same form;
    None for any other folder."""
    try:
        with (folder / "meta.json").open("rb") as file:
            meta = json.loads(file.read(_MAX_META_BYTES))
    except (OSError, ValueError, RecursionError):
        return None
    return meta if isinstance(meta, dict) and meta.get("trained") in WHOLE_MODELS else None


def with_transformer(base: Base, folder: Path) -> Base:
    """The base with the transformer in such a folder, and its own other parts."""
    folder = folder.absolute()
    name = folder.parent.name if folder.name == "model" else folder.name  # RUN/model
    changed = replace(base, name=name, hub_id=name, folder=folder, completed_by=base)
    return replace(changed, download=None)


def trained_from(base: Base) -> Base:
    """The base that supplies the other parts of a full training's result; else the base itself."""
    if base.folder is None or meta_of_full_training(base.folder) is None:
        return base
    assert base.completed_by is not None
    return base.completed_by


def tokens_of_full_training(base: Base) -> list[str]:
    """The tokens that a base has as the result of a full training; none of any other."""
    meta = None if base.folder is None else meta_of_full_training(base.folder)
    several, one = (meta or {}).get("placeholder_tokens"), (meta or {}).get("placeholder_token")
    return [each for each in (several or [one]) if isinstance(each, str)]


def _of_full_training(folder: Path, meta: dict[str, Any]) -> Base:
    try:
        return with_transformer(find_base(str(meta.get("base_model"))), folder)
    except UnknownBase as error:
        raise UnknownBase(
            f"{_shown(folder.name)} was made from {_shown(meta.get('base_model'))}, which is not "
            "a known base model: give that model's folder as base_model, and this one as weights"
        ) from error


def _read_index(
    index: bytes, source: str
) -> tuple[type[Family], bool, Base | None, tuple[float, ...]]:
    """The family whose pipeline class a model_index.json names, whether it is an editing model,
    the base it was made from, and its fixed schedule."""
    try:
        content = json.loads(index)
    except (ValueError, RecursionError) as error:
        raise UnknownBase(f"{source} is not JSON; download the model again") from error
    by_pipeline = {
        name: family
        for family in FAMILIES.values()
        for name in (family.classes.pipeline, family.classes.editing_pipeline)
        if name
    }
    pipeline = content.get("_class_name") if isinstance(content, dict) else None
    if not isinstance(pipeline, str) or pipeline not in by_pipeline:
        known = ", ".join(by_pipeline)
        raise UnknownBase(f"{source}: pipeline {_shown(pipeline)} is not one of {known}")
    family, named = by_pipeline[pipeline], content.get("_name_or_path")
    origin = by_hub_id(named) if isinstance(named, str) else None
    sigmas = content.get("sample_sigmas") or []
    numbers = isinstance(sigmas, list) and all(isinstance(each, int | float) for each in sigmas)
    if not numbers or sigmas != sorted({s for s in sigmas if 0 < s <= 1}, reverse=True):
        raise UnknownBase(f"{source}: sample_sigmas must be falling numbers from 1 to above 0")
    origin = origin if origin in family.bases else None
    return family, pipeline == family.classes.editing_pipeline, origin, tuple(sigmas)


def _shown(value: object) -> str:
    """A name from a user or a file on one short line."""
    text = safe_name(value) if isinstance(value, str) else type(value).__name__
    return ascii(text[:100]) if not text[:100].isprintable() else repr(text[:100])


def _hint(name: str) -> str:
    names = [*BASES, *(base.hub_id for base in BASES.values())]
    near = difflib.get_close_matches(name[:100], names, n=1)
    return f"; did you mean {near[0]!r}?" if near else ""


def by_hub_id(hub_id: str) -> Base | None:
    """The base with a Hub id, or None."""
    return next((base for base in BASES.values() if base.hub_id == hub_id), None)


NO_GPU = (
    "No GPU: using the miniature test model. It only knows simple shapes. Choose a model with "
    "--base_model."
)


def default_base(purpose: str = "generation") -> Base:
    """The base model for `auto` without weights; the choice and its reason are logged.

    `$BASE_MODEL`; otherwise the largest base that fits into the GPU's free memory for the purpose,
    generation or training; without a GPU, the included test model.
    """
    named = os.environ.get("BASE_MODEL")
    if named:
        base, why = find_base_or_folder(named), "$BASE_MODEL"
    else:
        base, why = _by_memory(purpose)
    if not named and base == _without_gpu():
        log.info(NO_GPU)
        return base
    log.info("base_model auto: %s (%s)", base.name, why)
    return base


def _without_gpu() -> Base:
    return next(each for family in FAMILIES.values() if (each := family.auto_without_gpu))


def _by_memory(purpose: str) -> tuple[Base, str]:
    # These import PyTorch, which takes a second; not needed for settings.
    from families.loading import default_device
    from families.memory import RESERVE, free_memory

    device = default_device()
    if device.type == "cpu":
        return _without_gpu(), "no GPU"
    if device.type == "mps":  # no quantization, so training needs about as much as generation
        purpose = "generation"
    return largest_that_fits(purpose, free_memory(device) * (1 - RESERVE))


def default_base_without_gpu() -> Base:
    """The included test model, which `auto` is without a GPU."""
    return _without_gpu()


def usual_base() -> Base:
    """The base model for `auto` where nothing is loaded and no GPU asked for: `$BASE_MODEL`, else
    the smallest that `auto` chooses on a GPU."""
    if named := os.environ.get("BASE_MODEL"):
        return find_base_or_folder(named)
    choices = [each for family in FAMILIES.values() if (each := family.auto_on_gpu)]
    return min(choices, key=lambda each: each.training_memory)


def largest_that_fits(purpose: str, free_bytes: float) -> tuple[Base, str]:
    """The largest base that fits into this memory for generation or training, and the reason."""
    free = free_bytes / 1e9
    field = f"{purpose}_memory"
    choices = [each for family in FAMILIES.values() if (each := family.auto_on_gpu)]
    needs = sorted(((getattr(each, field), each) for each in choices), key=lambda pair: -pair[0])
    listed = ", ".join(f"{base.name} {need:.1f} GB" for need, base in needs)
    why = f"{free:.1f} GB free; {purpose} needs: {listed}"
    for need, base in needs:
        if need <= free:
            return base, why
    return needs[-1][1], f"{why}; none fits, and this is the smallest"
