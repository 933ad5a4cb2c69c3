"""Rules that several programs share: base model, learning rate, clipping, counting of steps."""

import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

from families.base import Base, JobNames
from families.family import Family
from families.registry import (
    FAMILIES,
    UnknownBase,
    find_base_or_folder,
    undistilled,
)
from trainer.settings.inputs import RANGES, SettingsError
from trainer.settings.jobs.translation import UNCLIPPED, Translation

USUAL_RATE = 1e-4
UNLIMITED = 1_000_000  # as a rank
LARGEST_FACTOR = int(RANGES["lokr_factor"][1])  # near the square root of all sizes
_WEIGHTS = re.compile(r"\.(safetensors|sft|gguf|ckpt|pt|pth|bin)$")
_OTHER_MODELS = ("edit", "layered", "omni", "control", "2.1")  # in names of other models
_HARMLESS = {"", "bf16", "fp16", "fp32", "fp8", "e4m3fn", "scaled", "transformer", "20b"}


def family_named(found: Translation, key: str, name: str) -> tuple[type[Family], JobNames]:
    """The family that the program calls `name`, and its names there. Raises `SettingsError`."""
    known = {each: family for family in FAMILIES.values() for each in _names(family, found)}
    if name not in known:
        raise SettingsError(f"{key} is {name!r}; supported: {', '.join(sorted(known))}")
    return known[name], known[name].job_names[found.program]


def _names(family: type[Family], found: Translation) -> tuple[str, ...]:
    return family.job_names[found.program].names if found.program in family.job_names else ()


def base_named(found: Translation, key: str, name: str, family: type[Family]) -> Base:
    """The base model that a job names by Hub id, folder or file.

    A file's name is all that is known of it, so one that is not just the family's undistilled base
    model is reported as a difference. Raises `SettingsError` for an unknown name, unless
    `base_model` is given with the job.
    """
    if other := found.given.get("base_model"):
        found.no_effect(key, "base_model is given")
        base = undistilled(family) if other == "auto" else find_base_or_folder(str(other))
        found.settings["base_model"] = str(base.folder or base.name)
        return base
    if not name:
        raise SettingsError(f"{key} is missing")
    plain = True
    try:
        base = find_base_or_folder(name)
    except UnknownBase as error:
        stem = _WEIGHTS.sub("", PurePosixPath(name.replace("\\", "/")).name.lower())
        stem, file = stem.replace("_", "-"), _WEIGHTS.search(name.lower()) is not None
        bases = {each.hub_id.rpartition("/")[2].lower(): each for each in family.bases}
        fits = [tail for tail in bases if stem == tail or (file and tail in stem)]
        tail = max(fits, key=len, default="")
        if not fits or any(each in stem.replace(tail, "") for each in _OTHER_MODELS):
            raise SettingsError(f"{key}: {error}; or give --base-model") from error
        base, others = bases[tail], set(stem.replace(tail, "").split("-"))
        plain = not file or (base == undistilled(family) and others <= _HARMLESS)
        name = f"{name}, not read" if file else name
    if base.family != family.name:
        raise SettingsError(f"{key} is {base.name}, but this is a job for {family.title}")
    if plain:
        found.same(key, name, base_model=str(base.folder or base.name))
    else:
        text = f"{name}: the base model is known from the name of the file"
        found.differs(key, text, base_model=base.name)
    return base


def turbo_adapter(found: Translation, key: str, path: Any, difference: str = "") -> None:
    """The training adapter in a file, known by its name."""
    base = base_of(found)
    versions = {file.name: version for version, file in base.training_adapters.items()}
    wanted = versions.get(Path(str(path)).name, str(path))
    if difference:
        found.differs(key, difference, turbo_adapter=wanted)
    else:
        found.same(key, turbo_adapter=wanted)


def control_folders(found: Translation, keys: str, folders: Sequence[Any]) -> None:
    """The folders of the images before an edit."""
    given, base = [str(each) for each in folders if each], base_of(found)
    if not given:
        return
    if not base.most_references:
        found.refuse(keys, f"{', '.join(given)} ({base.name} does not edit images)")
    else:
        found.same(keys, controls=given)


def no_turbo_adapter(found: Translation, key: str) -> None:
    """Reports that the base has a training adapter and the job has none."""
    if base_of(found).training_adapters:
        found.differs(key, "the model's own training adapter is used")


def base_of(found: Translation) -> Base:
    """The base model of a translation whose rule for it has run."""
    return find_base_or_folder(found.settings["base_model"])


def learning_rate(found: Translation, key: str, default: float) -> None:
    """A rate that is missing is the program's default, which is often too low."""
    rate = found.get(key, default)
    if not isinstance(rate, int | float):
        found.refuse(key, f"{rate} (not a number)")
    elif key in found.keys or default >= USUAL_RATE:
        found.same(key, learning_rate=float(rate))
    else:
        found.differs(
            key,
            f"{rate:g} in {found.program}, which hardly trains; {USUAL_RATE:g} is usual",
            learning_rate=float(rate),
        )


def clipping(found: Translation, key: str, default: float = 1.0) -> None:
    """max_grad_norm, where 0 is no clipping."""
    norm = found.get(key, default)
    if norm:
        found.same(key, max_grad_norm=float(norm))
    else:
        found.same(key, "0 is no clipping", max_grad_norm=UNCLIPPED)


def alpha_is_rank(found: Translation, key: str, rank: float, default: float) -> None:
    """Refuses a LoRA with another strength than 1: alpha is the rank here."""
    alpha = found.get(key, default)
    if alpha == rank:
        found.same(key, f"{alpha:g}, the rank, as always here")
    else:
        found.refuse(
            key,
            f"{alpha} in {found.program}, so the LoRA counts {alpha}/{rank:g}; here alpha is the "
            f"rank (set {key} to {rank:g})",
        )


def lokr(found: Translation, rank_key: str, rank: int, factor_key: str, factor: int) -> bool:
    """LoKr with a factor as in LyCORIS, -1 for all sizes; returns whether its w2 has a rank.

    A rank that is above all sizes, as is usual there, means that w2 is whole.
    """
    found.same(factor_key, adapter="lokr", lokr_factor=LARGEST_FACTOR if factor == -1 else factor)
    ranked = rank <= RANGES["rank"][1]
    if ranked:
        found.same(rank_key, rank=rank)
    else:
        found.settings["rank"] = None
        found.same(rank_key, "both factors are whole")
    return ranked


def precision(found: Translation, key: str, default: str) -> None:
    """The number type of the frozen base model in training."""
    given = str(found.get(key, default))
    there = given if key in found.keys else f"{given} in {found.program}"
    if given.lower() in ("bf16", "bfloat16", "bfloat_16"):
        found.same(key, f"{there}, as always here on a GPU")
    else:
        found.differs(key, f"{there}; here the base is bfloat16 on a GPU")


def bucketing(found: Translation, key: str, default: bool, off: str) -> None:
    """Buckets by aspect ratio; `off` is what the program does without them."""
    if found.get(key, default):
        found.same(key, "as always here")
    else:
        found.differs(key, f"off: {off} there, here the nearest aspect ratio")


def swapped_blocks(found: Translation) -> None:
    """Blocks in CPU memory."""
    if swapped := found.get("blocks_to_swap"):
        found.differs("blocks_to_swap", f"{swapped} blocks", low_memory=True)


def optimizer(
    found: Translation,
    key: str,
    default: str,
    table: Mapping[str, tuple[str, float, str | None]],
    decay_key: str,
    decay: float | None = None,
) -> str:
    """optimizer and weight_decay, which is `decay` if it is given. Returns our optimizer.

    Rows of `table` are: theirs -> ours, default weight decay, and the difference or None.
    """
    rows = {name: (ours, difference) for name, (ours, _, difference) in table.items()}
    ours = found.choose(key, "optimizer", default, rows)
    name = str(found.get(key, default)).lower()
    decay = (table[name][1] if name in table else 0.01) if decay is None else decay
    found.same(decay_key, weight_decay=float(decay))
    return ours or "adamw"


def pairs(found: Translation, key: str) -> dict[str, str]:
    """The `name=value` pairs of a key: a list, or a text with spaces or commas before names."""
    given = found.keys.get(key) or []
    given = re.split(r"[\s,]+(?=\w+=)", given) if isinstance(given, str) else given
    pieces = (str(each).partition("=") for each in given)
    return {name.strip(): value.strip() for name, _, value in pieces if name.strip()}


def only_arguments(
    found: Translation,
    key: str,
    given: Mapping[str, str],
    known: Mapping[str, tuple[str, ...]],
) -> None:
    """Refuses arguments with other values than those that are always used here."""
    for name, value in given.items():
        if value.replace(" ", "") in known.get(name, ()):
            found.same(key, f"{name}={value}, as always here")
        else:
            found.refuse(key, f"{name}={value}")


def trackers(found: Translation, key: str) -> None:
    """Where the run is followed; not given: nowhere."""
    known = {"tensorboard": "tensorboard", "wandb": "wandb", "all": "tensorboard,wandb"}
    if found.get(key) == "none":
        found.no_effect(key, "none")
    elif key in found.keys:
        found.choose(key, "trackers", "none", known)


def shift_of_size(edge: float, last: int, most: float) -> float:
    """The shift that grows with the image: exp of a line from 0.5 at 256 tokens to `most` at
    `last`; a token is 16 x 16 pixels."""
    tokens = (edge / 16) ** 2
    return round(math.exp(0.5 + (most - 0.5) * (tokens - 256) / (last - 256)), 2)


def count(
    found: Translation,
    setting: str,
    steps: tuple[str, float | None],
    epochs: tuple[str, float | None] = ("", None),
) -> None:
    """A number of steps, or of epochs, which has priority where it is given.

    `steps`, `epochs`: the key and its default. Epochs are collected in `settings["epochs"]`.
    """
    key, number_of = epochs[0], found.get(epochs[0], epochs[1])
    if number_of:
        found.settings.setdefault("epochs", {})[setting] = number_of
        found.same(key, f"{number_of:g} epochs become {setting}, when the images are counted")
        if steps[0] in found.keys:
            found.no_effect(steps[0], f"{key} is given")
        return
    if key in found.keys:
        found.no_effect(key, "not given")
    value = found.get(*steps)
    if value is not None:
        found.same(steps[0], **{setting: value})


def epoch(
    found: Translation, passes: float, batch: int, accumulation: int = 1, drop_last: bool = False
) -> None:
    """What an epoch is, if anything is counted in epochs; see `trainer.settings.epochs`."""
    if found.settings.get("epochs"):
        found.settings["epochs"] |= {
            "passes": passes,
            "batch": batch,
            "accumulation": accumulation,
            "drop_last": int(drop_last),
        }


def repeats(found: Translation, key: str, passes: float) -> None:
    """The repeats of the only dataset, which count only where epochs are counted."""
    if found.settings.get("epochs"):
        found.same(key, f"an epoch is {passes:g} passes")
    elif found.get(key):
        found.differs(key, f"{passes:g} passes: no effect, as steps are given for one dataset")


def only_dataset(datasets: Any, what: str) -> dict[str, Any]:
    """The only item of a list of datasets. Raises `SettingsError`."""
    if not isinstance(datasets, list) or len(datasets) != 1 or not isinstance(datasets[0], dict):
        raise SettingsError(
            f"{what} must list exactly one dataset; put all images and captions into one folder"
        )
    return dict(datasets[0])
