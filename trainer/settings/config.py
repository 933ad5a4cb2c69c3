"""Reads YAML files for `python -m trainer`: sections and keys, checked by name and type.

base_model: z-image-turbo
dataset: imgs.zip
output_dir: outputs/robot   the run's folder; or name: robot, for a new one with the date
train:   every other input of `trainer.settings.inputs`
sample:  prompts, interval and options of preview images
debug:   log_prompt_ids
"""

import difflib
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from inference.input_fields import IN_WORDS, Interface, number_of
from inference.inputs import SharedInputs
from inference.request import Request
from trainer.settings.fields import Settings, resolve
from trainer.settings.inputs import INPUTS, SettingsError, TrainingInputs
from trainer.settings.jobs.reading import PROGRAMS, program_of, read_job
from trainer.settings.parsing import JOB_SUFFIXES, parse

# The keys of every section with their types, and their inputs. Other keys of `sample` are inputs of
# generation, for all preview images.
Types = tuple[type, ...]
_SECTIONS: dict[str, dict[str, Types]] = {"": {}, "train": {}, "sample": {}, "debug": {}}
_NAMES: dict[tuple[str, str], str] = {}
for _name, _each in INPUTS.items():
    if Interface.YAML in _each.on:
        _key = _each.key or _name
        _SECTIONS[_each.section][_key] = TrainingInputs.types(_name)
        _NAMES[_each.section, _key] = _name
_SECTIONS["sample"] |= {
    name: SharedInputs.types(name) for name in SharedInputs.inputs() if name != "prompt"
}
_TOP = _SECTIONS.pop("")

_SECRET = {"wandb_api_key": "WANDB_API_KEY", "hf_token": "HF_TOKEN"}

# Names in other programs, by section -> ours. The alpha of a LoRA is its rank here.
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

_YAML_WORDS: dict[Any, str] = IN_WORDS | {
    str: "text (in quotes, if YAML would read it as something else)"
}


def read_config(
    path: str | os.PathLike[str], defaults: Mapping[str, Any] | None = None, **overrides: Any
) -> Settings:
    """The settings of a run in a file; see `read_inputs`."""
    inputs = read_inputs(path, defaults, **overrides)
    try:
        return resolve(inputs)
    except ValueError as error:
        raise SettingsError(f"{path}: {error}") from error


def read_inputs(
    path: str | os.PathLike[str], defaults: Mapping[str, Any] | None = None, **overrides: Any
) -> TrainingInputs:
    """The inputs in a YAML file, or in a job file of another program (`trainer.settings.jobs`).

    Relative paths are relative to the working directory. A key without a value has its default.
    `overrides` are inputs that replace those of the file, `defaults` those that it lacks. Raises
    `SettingsError` that names the file and the key, and for an unknown key the nearest known one.
    """
    path = Path(path)
    content = parse(path)
    if program := program_of(content):
        return read_job(path, content, program, defaults or {}, overrides)
    if path.suffix.lower() in JOB_SUFFIXES:
        programs = ", ".join(each.name for each in PROGRAMS)
        raise SettingsError(
            f"{path} is not a job file of a known program ({programs}); settings of this project "
            "are YAML files"
        )
    if not isinstance(content, dict):
        raise SettingsError(f"{path}: expected keys such as base_model, dataset, train")
    top = _checked(path, "", content, _TOP | dict.fromkeys(_SECTIONS, (dict,)))
    given = {_NAMES["", key]: value for key, value in top.items() if key not in _SECTIONS}
    options: dict[str, Any] = {}
    for section, known in _SECTIONS.items():
        for key, value in _checked(path, f"{section}.", top.get(section, {}), known).items():
            if (section, key) in _NAMES:
                given[_NAMES[section, key]] = value
            else:
                options[key] = value
    prompts = given.get("sample_prompts")
    try:
        if isinstance(prompts, str):  # None: the default previews; an empty text: none
            given["sample_prompts"] = prompts = [prompts] if prompts.strip() else []
        for number, prompt in enumerate(prompts or (), start=1):
            if not isinstance(prompt, str):
                raise SettingsError(f"sample.prompts: number {number} is {prompt!r}, not text")
            Request(prompt=prompt, **options)  # generated later, checked here
        return TrainingInputs(
            **({"sample_options": options, **(defaults or {})} | given | overrides)
        )
    except ValueError as error:
        raise SettingsError(f"{path}: {error}") from error


def _checked(
    path: Path, prefix: str, section: dict[Any, Any], known: dict[str, Types]
) -> dict[str, Any]:
    """The section's values with the types of `known`, without keys that have no value."""
    for key in section:
        if key not in known:
            raise SettingsError(f"{path}: unknown key {prefix}{key}; {_hint(key, prefix, known)}")
    return {
        key: _typed(value, known[key], f"{path}: {prefix}{key}")
        for key, value in section.items()
        if value is not None
    }


def _hint(key: Any, prefix: str, known: dict[str, Types]) -> str:
    """Suggests a known key for an unknown one: the same in another section, or a similar one."""
    if key in _SECRET:
        return f"secrets do not belong in files; set {_SECRET[key]} in the environment"
    key = str(key).lower().replace("-", "_")
    key = _ELSEWHERE.get((prefix, key)) or _ELSEWHERE.get(("", key), key)
    meant = [prefix + key] if key in known else [key] if key in _TOP else []
    meant += [f"{name}.{key}" for name, keys in _SECTIONS.items() if key in keys]
    if key.startswith("sample_") and key.removeprefix("sample_") in _SECTIONS["sample"]:
        meant.append(f"sample.{key.removeprefix('sample_')}")
    meant += [prefix + near for near in difflib.get_close_matches(key, known, 1, cutoff=0.5)]
    return f"did you mean {meant[0]}?" if meant else f"known: {', '.join(known)}"


def _typed(value: Any, wanted: Types, name: str) -> Any:
    """The value as one of the wanted types. YAML reads numbers such as 1e-5 and 1e3 as text."""
    python: dict[Any, type] = {Path: str, Sequence: list}
    accepted = [python.get(each, each) for each in wanted]
    if type(value) is int and value.bit_length() > 63:  # might be too long to print
        raise SettingsError(f"{name} is a number of more than 64 bits; use a smaller one")
    if type(value) in accepted:
        return value
    number = None if isinstance(value, bool) else number_of(value, wanted)
    if number is not None:
        return number
    expected = " or ".join(_YAML_WORDS.get(each, _YAML_WORDS[str]) for each in wanted)
    raise SettingsError(f"{name} is {value!r}; expected {expected}")
