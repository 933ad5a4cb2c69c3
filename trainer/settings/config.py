"""YAML files for `python -m trainer`: sections and keys, checked by name and by type.

base_model: z-image-turbo
dataset: imgs.zip
output_dir: outputs/robot   the run's own folder; name: robot gives it a new one, with the date
train:   every other setting of `trainer.settings.fields`
sample:  prompts to draw every so many steps and with the finished weights, and how
debug:   log_prompt_ids
"""

import difflib
import logging
import os
import typing
from pathlib import Path
from typing import Any

import yaml

from adapters.files.containers import Unusable
from inference.request import Request
from trainer.encodings import decode
from trainer.settings.ai_toolkit import is_ai_toolkit, read_job
from trainer.settings.checks import IN_WORDS
from trainer.settings.fields import Settings, SettingsError, settle

log = logging.getLogger(__name__)

_TOP: dict[str, Any] = dict.fromkeys(("base_model", "dataset", "output_dir", "name"), str)
_NOT_IN_TRAIN = {
    "base",
    "given",
    "seed_is_random",
    "resolutions",
    "log_prompt_ids",
    "foreign_captions",
    *_TOP,
}
_TRAIN: dict[str, Any] = {
    name: wanted
    for name, wanted in typing.get_type_hints(Settings).items()
    if name not in _NOT_IN_TRAIN and not name.startswith("sample_")
} | {"resolution": int | str | list, "lora_targets": str | list, "trackers": str | list}
_TRAIN["validation_images"] = int | str
_SAMPLE: dict[str, Any] = {"prompts": str | list, "every": int} | {
    name: wanted
    for name, wanted in typing.get_type_hints(Request).items()
    if name not in ("prompt", "image")
}
_SECTIONS = {"train": _TRAIN, "sample": _SAMPLE, "debug": {"log_prompt_ids": bool}}

_SECRET = {"wandb_api_key": "WANDB_API_KEY", "hf_token": "HF_TOKEN"}

# Names of other programs, by section, and ours. The alpha of a LoRA is its rank here.
_ELSEWHERE = {
    ("sample.", "steps"): "num_inference_steps",
    **{("", name): "num_inference_steps" for name in ("sample_steps", "inference_steps")},
    **{("", name): "rank" for name in ("network_dim", "network_rank", "lora_dim", "dim", "r")},
    **{("", name): "rank" for name in ("lora_alpha", "network_alpha", "alpha")},
    **{("", name): "learning_rate" for name in ("lr", "unet_lr", "network_lr")},
    **{("", name): "steps" for name in ("max_train_steps", "num_train_steps", "max_steps")},
    **{("", name): "checkpoint_every" for name in ("save_every", "save_steps", "checkpoints")},
    **{("", name): "base_model" for name in ("model", "base", "name_or_path")},
    **{("", name): "guidance_scale" for name in ("cfg", "cfg_scale")},
    **{("", name): "num_outputs" for name in ("num_images", "images")},
    ("", "token"): "placeholder_token",
    ("", "resume"): "resume_from",
    ("", "bs"): "batch_size",
}

MAX_VALUES = 10_000

_IN_WORDS = IN_WORDS | {
    str: "text (in quotes, where YAML would read something else)",
    list: "a list",
    dict: "a section of keys",
}


def read_config(path: str | os.PathLike[str], **overrides: Any) -> Settings:
    """Settings from a YAML file; relative paths in it are relative to the working folder.

    A key without a value has its default. `overrides` replace top-level keys. Raises
    `SettingsError` that names the file and the key; for an unknown key also the nearest known one.
    """
    path = Path(path)
    try:
        text, guess = decode(path.read_bytes())
        content = yaml.safe_load(text)
    except OSError as error:
        raise SettingsError(
            f"{path}: {error.strerror}; give a YAML file such as configs/z_image_turbo.yaml"
        ) from error
    except Unusable as error:
        raise SettingsError(f"{path}: {error}") from error
    except (yaml.YAMLError, ValueError, OverflowError, RecursionError) as error:
        reason = " ".join(str(error).split())
        raise SettingsError(f"{path} is not a YAML file: {reason}") from error
    if guess is not None:
        beyond = [line.strip() for line in text.splitlines() if not line.isascii()]
        log.warning(
            "%s is not UTF-8 and is read as %s; if this is not what was written, save it as "
            "UTF-8: %s",
            *(path, guess, " | ".join(line[:80] for line in beyond[:5])),
        )
    if _holds_more_than(MAX_VALUES, content):
        raise SettingsError(f"{path} holds more than {MAX_VALUES:,} values; it is no such file")
    if not isinstance(content, dict):
        raise SettingsError(f"{path}: expected keys such as base_model, dataset, train")
    if is_ai_toolkit(content):
        return read_job(path, content, **overrides)
    top = _checked(path, "", content, _TOP | dict.fromkeys(_SECTIONS, dict))
    train, sample, debug = (
        _checked(path, f"{name}.", top.pop(name, {}), known) for name, known in _SECTIONS.items()
    )

    for several in ("resolution", "lora_targets", "trackers"):
        if isinstance(train.get(several), list):
            train[several] = ",".join(map(str, train[several]))
    prompts, every = sample.pop("prompts", None), sample.pop("every", 0)
    if isinstance(prompts, str):  # None stands for the default previews, nothing for none
        prompts = [prompts] if prompts.strip() else []
    try:
        for number, prompt in enumerate(prompts or (), start=1):
            if not isinstance(prompt, str):
                raise SettingsError(f"sample.prompts: number {number} is {prompt!r}, not text")
            Request(prompt=prompt, **sample)  # generated later, checked here
        return settle(
            sample_prompts=None if prompts is None else tuple(prompts),
            sample_every=every,
            sample_options=sample,
            log_prompt_ids=debug.get("log_prompt_ids", False),
            **(top | train | overrides),
        )
    except ValueError as error:
        raise SettingsError(f"{path}: {error}") from error


def _holds_more_than(most: int, content: Any) -> bool:
    """Whether it has more values, those behind YAML's aliases counted as often as they are named.

    A few lines of aliases of aliases are billions of values to whoever prints them.
    """
    waiting, seen = [content], 0
    while waiting and seen <= most:
        each = waiting.pop()
        seen += 1
        if isinstance(each, dict):
            waiting += [*each, *each.values()]
        elif isinstance(each, list | tuple | set):
            waiting += each
    return seen > most


def _checked(
    path: Path, prefix: str, section: dict[Any, Any], known: dict[str, Any]
) -> dict[str, Any]:
    """The section's values in the types of `known`, without the keys that have none."""
    for key in section:
        if key not in known:
            raise SettingsError(f"{path}: unknown key {prefix}{key}; {_hint(key, prefix, known)}")
    return {
        key: _typed(value, known[key], f"{path}: {prefix}{key}")
        for key, value in section.items()
        if value is not None
    }


def _hint(key: Any, prefix: str, known: dict[str, Any]) -> str:
    """What an unknown key may have been meant to be: the same key elsewhere, else a similar one."""
    if key in _SECRET:
        return f"keys are not for files; set {_SECRET[key]} in the environment"
    key = str(key).lower().replace("-", "_")
    key = _ELSEWHERE.get((prefix, key)) or _ELSEWHERE.get(("", key), key)
    meant = [prefix + key] if key in known else [key] if key in _TOP else []
    meant += [f"{name}.{key}" for name, keys in _SECTIONS.items() if key in keys]
    if key.startswith("sample_") and key.removeprefix("sample_") in _SAMPLE:  # as train.py has it
        meant.append(f"sample.{key.removeprefix('sample_')}")
    meant += [prefix + near for near in difflib.get_close_matches(key, known, 1, cutoff=0.5)]
    return f"did you mean {meant[0]}?" if meant else f"known: {', '.join(known)}"


def _typed(value: Any, wanted: Any, name: str) -> Any:
    """The value as one of the wanted types; YAML reads numbers such as 1e-5 and 1e3 as text."""
    kinds = (str if each is Path else each for each in typing.get_args(wanted) or (wanted,))
    accepted = [each for each in kinds if each is not type(None)]
    if type(value) is int and value.bit_length() > 63:  # not even an error could print it
        raise SettingsError(f"{name} is a number beyond 64 bits")
    if type(value) in accepted:
        return value
    for number in (int, float):
        if number in accepted and not isinstance(value, bool):
            try:
                if number(float(value)) == float(value):
                    return number(float(value))
            except (TypeError, ValueError, OverflowError):
                pass
    expected = " or ".join(_IN_WORDS[each] for each in accepted)
    raise SettingsError(f"{name} is {value!r}; expected {expected}")
