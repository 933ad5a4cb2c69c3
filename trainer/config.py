"""YAML files for `python -m trainer`: sections and keys, checked by name.

base_model: z-image-turbo
dataset: imgs.zip
output_dir: outputs
train:   every other setting of `trainer.settings`
sample:  prompts to draw with the finished weights, and how
debug:   log_prompt_ids
"""

import difflib
import os
import typing
from dataclasses import fields
from pathlib import Path
from typing import Any

import yaml

from inference.request import Request
from trainer.settings import Settings, SettingsError, settle

_TOP = ("base_model", "dataset", "output_dir")
_NOT_IN_TRAIN = {"base", "dataset", "output_dir", "resolutions", "log_prompt_ids"}
_TRAIN = ("resolution",) + tuple(
    field.name
    for field in fields(Settings)
    if field.name not in _NOT_IN_TRAIN and not field.name.startswith("sample_")
)
_SAMPLE = ("prompts",) + tuple(field.name for field in fields(Request) if field.name != "prompt")
_SECTIONS = {"train": _TRAIN, "sample": _SAMPLE, "debug": ("log_prompt_ids",)}


def read_config(path: str | os.PathLike[str], **overrides: Any) -> Settings:
    """Settings from a YAML file; relative paths in it are relative to the working folder.

    A placeholder is trained only where the file asks for it. `overrides` replace top-level keys.
    Raises `SettingsError` that names the file and the key; for an unknown key also the nearest
    known one.
    """
    path = Path(path)
    try:
        content = yaml.safe_load(path.read_text())
    except (OSError, yaml.YAMLError, UnicodeDecodeError) as error:
        raise SettingsError(f"{path}: {error}") from error
    if not isinstance(content, dict):
        raise SettingsError(f"{path}: expected keys such as base_model, dataset, train")
    _known(path, "", content, (*_TOP, *_SECTIONS))
    sections = {name: content.pop(name, None) or {} for name in _SECTIONS}
    for name, section in sections.items():
        if not isinstance(section, dict):
            raise SettingsError(f"{path}: {name} is not a section of keys")
        _known(path, f"{name}.", section, _SECTIONS[name])

    sample = dict(sections["sample"])
    prompts = sample.pop("prompts", None) or ()
    if isinstance(prompts, str):
        prompts = (prompts,)
    train = _typed(path, sections["train"])
    train.setdefault("train_placeholder_token", False)
    asked = os.environ.get("LOG_PROMPT_IDS", "").lower() in ("1", "true", "yes")
    try:
        Request(prompt="checked here, drawn later", **sample)
        return settle(
            sample_prompts=tuple(prompts),
            sample_options=sample,
            log_prompt_ids=bool(sections["debug"].get("log_prompt_ids", False)) or asked,
            **(content | train | overrides),
        )
    except (ValueError, TypeError) as error:
        raise SettingsError(f"{path}: {error}") from error


def _known(path: Path, prefix: str, section: dict[Any, Any], known: tuple[str, ...]) -> None:
    for key in section:
        if key not in known:
            near = difflib.get_close_matches(str(key), known, n=1, cutoff=0.4)
            hint = f"; did you mean {prefix}{near[0]}?" if near else f"; known: {', '.join(known)}"
            raise SettingsError(f"{path}: unknown key {prefix}{key}{hint}")


def _typed(path: Path, train: dict[str, Any]) -> dict[str, Any]:
    """YAML reads 1e-5 as text; numbers are taken by the setting's own type."""
    types = typing.get_type_hints(Settings)
    values = {}
    for key, value in train.items():
        wanted = types.get(key)
        if wanted is float and isinstance(value, str | int) and not isinstance(value, bool):
            try:
                value = float(value)
            except ValueError as error:
                raise SettingsError(f"{path}: train.{key} is {value!r}, not a number") from error
        if wanted in (int, bool, str) and value is not None and type(value) is not wanted:
            raise SettingsError(f"{path}: train.{key} is {value!r}; expected {wanted.__name__}")
        values[key] = value
    return values
