"""Converts job files of ai-toolkit to our inputs. Every key is accounted for.

A key is translated; or similar, with a difference that is logged; or has no effect on the weights;
or is refused, because ignoring it would train something else. No key is ignored silently. Missing
keys have ai-toolkit's defaults, not ours. The keys are in `trainer.settings.ai_toolkit_keys`; those
that depend on each other in `trainer.settings.ai_toolkit_rules`.
"""

import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from inference.request import Request
from trainer.settings.ai_toolkit_keys import (
    DEFAULTS,
    NO_EFFECT,
    ONLY,
    SAMPLE,
    SETTING,
    SWITCHED_BY,
    TEXTS,
    VIDEO,
)
from trainer.settings.ai_toolkit_rules import RULES, TOGETHER, Translation, base_of, number
from trainer.settings.inputs import SettingsError, TrainingInputs

log = logging.getLogger(__name__)


def is_ai_toolkit(content: Any) -> bool:
    """Whether the content of a YAML file is a job of ai-toolkit."""
    return isinstance(content, dict) and "job" in content and "config" in content


def read_job(path: Path, content: Mapping[str, Any], **overrides: Any) -> TrainingInputs:
    """The inputs of the job's process; logs how every key was converted.

    `overrides` are inputs that replace those of the job. Raises `SettingsError` that lists all
    refused keys.
    """
    try:
        found = translate(content)
    except SettingsError as error:
        raise SettingsError(f"{path}: {error}") from error
    for title, lines in (
        ("keys of ai-toolkit, translated", found.translated),
        ("similar, but not equal here", found.near),
        ("not supported, and without effect on the weights", found.without_effect),
    ):
        if lines:
            log.info("%s:\n  %s", title, "\n  ".join(lines))
    if found.refused:
        raise SettingsError(
            f"{path}: these keys change the training and are not supported:\n  "
            + "\n  ".join(found.refused)
            + "\nremove them to train without them, or change them as shown"
        )
    try:
        for prompt in found.settings["sample_prompts"]:
            Request(prompt=prompt, **found.sample)  # generated later, checked here
        return TrainingInputs(**({"sample_options": found.sample} | found.settings | overrides))
    except ValueError as error:
        raise SettingsError(f"{path}: {error}") from error


def translate(content: Mapping[str, Any]) -> Translation:
    """Sorts every key of a job into one of the four lists. Raises `SettingsError`."""
    name, process = _process(content)
    keys = _flat(process)
    found = Translation(settings=dict(DEFAULTS))
    base = base_of(keys, found)
    if process.get("network") is None:
        found.refused.append(
            "network (missing): ai-toolkit then trains the whole model; add a network of type lora"
        )
    found.settings["output_dir"] = str(Path(str(keys.get("training_folder", "output"))) / name)
    found.translated.append(f"training_folder and name: output_dir {found.settings['output_dir']}")
    for key, value in keys.items():
        _place(key, value, keys, found)
    for rule in RULES:
        rule(keys, base, found)
    for key in sorted({*content} - {"job", "config"}):
        found.without_effect.append(key)
    return found


def _place(key: str, value: Any, keys: Mapping[str, Any], found: Translation) -> None:
    """Sorts one key into its list."""
    value = value if key in TEXTS else number(value)
    if key in TOGETHER:
        return  # handled by a rule
    switch = SWITCHED_BY.get(key)
    if switch is not None and not keys.get(switch):
        found.without_effect.append(f"{key} (while {switch} is off)")
        return
    if key in VIDEO and number(keys.get("datasets.num_frames", 1)) == 1:
        found.without_effect.append(f"{key} (for video; this dataset has one frame)")
        return
    if key in TEXTS and value is not None and not isinstance(value, str | bool):
        found.refused.append(f"{key}: {value} (not text; write it in quotes)")
        return
    if key in SETTING or key in SAMPLE:
        target, name = (
            (found.settings, SETTING[key]) if key in SETTING else (found.sample, SAMPLE[key])
        )
        if (
            (value is None or value == [])
            or (value is False and name != "gradient_checkpointing")
            or (key == "sample.seed" and value == -1)  # any seed
        ):
            found.without_effect.append(f"{key} (not given)")
            return
        if name == "resolution":
            value = (
                ",".join(map(str, dict.fromkeys(map(number, value))))
                if isinstance(value, list)
                else value
            )
        if name == "guidance_scale":
            value = (
                max(1, value) if isinstance(value, int | float) else value
            )  # off is below 1 there, and 1 here
        target[name] = value
        found.translated.append(f"{key}: {name} {value}")
    elif key in _CHOICES:
        _CHOICES[key](value, found)
    elif key in ONLY:
        if value in ONLY[key]:
            found.translated.append(f"{key}: {value}, as always here")
        else:
            known = " or ".join(map(str, ONLY[key]))
            found.refused.append(f"{key}: {value} (only {known} is supported)")
    elif key in NO_EFFECT:
        found.without_effect.append(key)
    elif value in (None, False, "", 0) or value == [] or value == {}:
        found.without_effect.append(f"{key} (switched off)")
    else:
        found.refused.append(f"{key}: {value}")


# Keys with a few possible values.


def _layer_offloading(value: Any, found: Translation) -> None:
    if value:
        found.settings["low_memory"] = True
        found.translated.append("model.layer_offloading: low_memory True")
    else:
        found.without_effect.append("model.layer_offloading (free memory decides)")


def _low_vram(value: Any, found: Translation) -> None:
    # ai-toolkit loads and quantizes on the CPU, as we do, and then trains on the GPU.
    state = "the base model is always quantized before it moves to the GPU" if value else "off"
    found.without_effect.append(f"model.low_vram ({state})")


def _use_wandb(value: Any, found: Translation) -> None:
    if value:
        found.settings["trackers"] = ("wandb",)
        found.translated.append("logging.use_wandb: trackers wandb")
    else:
        found.without_effect.append("logging.use_wandb (switched off)")


def _walk_seed(value: Any, found: Translation) -> None:
    if value:
        found.near.append("sample.walk_seed: all samples have the same seed")
    else:
        found.translated.append("sample.walk_seed: all samples have the same seed")


_CHOICES: dict[str, Callable[[Any, Translation], None]] = {
    "model.low_vram": _low_vram,
    "model.layer_offloading": _layer_offloading,
    "model.auto_memory": _layer_offloading,  # its older name
    "logging.use_wandb": _use_wandb,
    "sample.walk_seed": _walk_seed,
}


def _process(content: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    """The job's name and its only process, with its only dataset instead of the list."""
    config = content["config"]
    processes = config.get("process") if isinstance(config, dict) else None
    if not isinstance(processes, list) or not all(isinstance(each, dict) for each in processes):
        raise SettingsError("config.process must be a list of processes, as in ai-toolkit")
    if len(processes) != 1:
        raise SettingsError(
            f"config.process lists {len(processes)}; write each into a separate file"
        )
    process = dict(processes[0])
    datasets = process.get("datasets") or []
    if not isinstance(datasets, list) or len(datasets) != 1 or not isinstance(datasets[0], dict):
        raise SettingsError(
            "datasets must list exactly one folder; put all images and captions into one (several "
            "sizes go into its resolution)"
        )
    process["datasets"] = datasets[0]
    return str(config.get("name", "lora")), process


def _flat(section: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Flattens sections to dotted keys; an empty section is a value."""
    keys: dict[str, Any] = {}
    for key, value in section.items():
        if isinstance(value, dict) and value:
            keys |= _flat(value, f"{prefix}{key}.")
        else:
            keys[f"{prefix}{key}"] = value
    return keys
