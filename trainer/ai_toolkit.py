"""Job files of ai-toolkit, read as settings of ours, with every key of theirs accounted for.

A key is one of four: translated; near, where ours differs in a way that the log states; without
effect on the weights; or refused, because leaving it out would train something else. Nothing is
ignored in silence. What a file leaves out means ai-toolkit's default, not ours. The keys are in
`trainer.ai_toolkit_keys`.
"""

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from families.bases import Base, UnknownBase, find_base_or_folder
from inference.request import Request
from trainer.ai_toolkit_keys import (
    ARCHITECTURES,
    DEFAULTS,
    NO_EFFECT,
    ONLY,
    SAMPLE,
    SETTING,
    TIMESTEPS,
    WEIGHT_DECAY,
)
from trainer.optimizers import OPTIMIZERS, SCHEDULES
from trainer.settings import Settings, SettingsError, settle

log = logging.getLogger(__name__)


@dataclass
class Translation:
    """One job in our words, and what became of each of its keys."""

    settings: dict[str, Any] = field(default_factory=dict)  # arguments of `trainer.settings.settle`
    sample: dict[str, Any] = field(default_factory=dict)  # fields of a drawing request
    translated: list[str] = field(default_factory=list)
    near: list[str] = field(default_factory=list)
    without_effect: list[str] = field(default_factory=list)
    refused: list[str] = field(default_factory=list)


def is_ai_toolkit(content: Any) -> bool:
    """Whether the content of a YAML file is a job of ai-toolkit's."""
    return isinstance(content, dict) and "job" in content and "config" in content


def read_job(path: Path, content: Mapping[str, Any], **overrides: Any) -> Settings:
    """Settings of the job's one process; logs what became of every key.

    `overrides` replace settings of ours. Raises `SettingsError` that lists every refused key.
    """
    try:
        found = translate(content)
    except SettingsError as error:
        raise SettingsError(f"{path}: {error}") from error
    for title, lines in (
        ("ai-toolkit's keys, translated", found.translated),
        ("near, but not the same here", found.near),
        ("without counterpart and without effect on the weights", found.without_effect),
    ):
        if lines:
            log.info("%s:\n  %s", title, "\n  ".join(lines))
    if found.refused:
        raise SettingsError(
            f"{path}: these keys change what is trained and have no counterpart here:\n  "
            + "\n  ".join(found.refused)
            + "\nremove them to train without, or change them as said"
        )
    try:
        for prompt in found.settings["sample_prompts"]:
            Request(prompt=prompt, **found.sample)  # drawn later, checked here
        return settle(sample_options=found.sample, **(found.settings | overrides))
    except (TypeError, ValueError) as error:
        raise SettingsError(f"{path}: {error}") from error


def translate(content: Mapping[str, Any]) -> Translation:
    """Every key of a job in one of the four lists. Raises `SettingsError` for another layout."""
    name, process = _process(content)
    keys = _flat(process)
    found = Translation(settings=dict(DEFAULTS) | {"train_placeholder_token": False})
    base = _base(keys, found)
    found.settings["output_dir"] = str(Path(str(keys.get("training_folder", "output"))) / name)
    found.translated.append(f"training_folder and name: output_dir {found.settings['output_dir']}")
    _sample_prompts(keys, found)
    _ema(keys, found)
    _quantize(keys, found)
    _turbo_adapter(keys, base, found)
    for key, value in keys.items():
        _place(key, value, found)
    optimizer = found.settings.setdefault("optimizer", "adamw")
    found.settings.setdefault("weight_decay", WEIGHT_DECAY.get(optimizer, 0.01))
    for key in sorted({*content} - {"job", "config"}):
        found.without_effect.append(key)
    return found


def _place(key: str, value: Any, found: Translation) -> None:
    """One key into its list."""
    value = _number(value)
    if key in _TAKEN:
        return  # read together with others, which have named it
    if key in SETTING or key in SAMPLE:
        target, name = (
            (found.settings, SETTING[key]) if key in SETTING else (found.sample, SAMPLE[key])
        )
        if value is None or value is False:
            found.without_effect.append(f"{key} (not given)")
            return
        if name == "resolution":
            value = ",".join(map(str, dict.fromkeys(value))) if isinstance(value, list) else value
        if name == "guidance_scale":
            value = max(1, value)  # they read anything below 1 as off, as 1 is here
        target[name] = value
        found.translated.append(f"{key}: {name} {value}")
    elif key in _CHOICES:
        _CHOICES[key](value, found)
    elif key in ONLY:
        if value in ONLY[key]:
            found.translated.append(f"{key}: {value} is what is done here")
        else:
            known = " or ".join(map(str, ONLY[key]))
            found.refused.append(f"{key}: {value} (only {known} is known here)")
    elif key in NO_EFFECT:
        found.without_effect.append(key)
    elif value in (None, False, "", 0) or value == [] or value == {}:
        found.without_effect.append(f"{key} (switched off)")
    else:
        found.refused.append(f"{key}: {value}")


# Keys whose value is a choice among words.


def _optimizer(value: Any, found: Translation) -> None:
    name = str(value).lower()
    if name not in OPTIMIZERS:
        known = ", ".join(OPTIMIZERS)
        found.refused.append(f"train.optimizer: {value} (known here: {known})")
        return
    found.settings["optimizer"] = name
    found.translated.append(f"train.optimizer: optimizer {name}")


def _lr_scheduler(value: Any, found: Translation) -> None:
    if value not in SCHEDULES:
        known = ", ".join(SCHEDULES)
        found.refused.append(f"train.lr_scheduler: {value} (known here: {known})")
        return
    found.settings["lr_scheduler"] = value
    found.translated.append(f"train.lr_scheduler: lr_scheduler {value}")


def _timestep_type(value: Any, found: Translation) -> None:
    if value not in TIMESTEPS:
        known = ", ".join(TIMESTEPS)
        found.refused.append(f"train.timestep_type: {value} (known here: {known})")
        return
    name, difference = TIMESTEPS[value]
    found.settings["timestep_sampling"] = name
    line = f"train.timestep_type: {value} becomes timestep_sampling {name}"
    if difference:
        found.near.append(f"{line}: {difference}")
    else:
        found.translated.append(line)


def _linear_timesteps(value: Any, found: Translation) -> None:
    if value:
        _timestep_type("linear", found)
    else:
        found.without_effect.append("train.linear_timesteps (switched off)")


def _low_memory(value: Any, found: Translation) -> None:
    if value:
        found.settings["low_memory"] = True
        found.translated.append("model.low_vram or layer_offloading: low_memory True")
    else:
        found.without_effect.append("model.low_vram or layer_offloading (free memory decides)")


def _use_wandb(value: Any, found: Translation) -> None:
    if value:
        found.settings["trackers"] = ("wandb",)
        found.translated.append("logging.use_wandb: trackers wandb")
    else:
        found.without_effect.append("logging.use_wandb (switched off)")


def _walk_seed(value: Any, found: Translation) -> None:
    if value:
        found.near.append("sample.walk_seed: every prompt is drawn with the one seed")
    else:
        found.translated.append("sample.walk_seed: every prompt is drawn with the one seed")


_CHOICES: dict[str, Callable[[Any, Translation], None]] = {
    "train.optimizer": _optimizer,
    "train.lr_scheduler": _lr_scheduler,
    "train.timestep_type": _timestep_type,
    "train.linear_timesteps": _linear_timesteps,
    "model.low_vram": _low_memory,
    "model.layer_offloading": _low_memory,
    "logging.use_wandb": _use_wandb,
    "sample.walk_seed": _walk_seed,
}

# Keys that are read together, below.
_TAKEN = {
    *("training_folder", "sample.prompts", "sample.samples", "train.disable_sampling"),
    *("train.ema_config.use_ema", "train.ema_config.ema_decay", "train.ema_config"),
    *("model.name_or_path", "model.arch", "model.assistant_lora_path"),
    *("model.quantize", "model.qtype"),
}


def _base(keys: Mapping[str, Any], found: Translation) -> Base:
    architecture, _, kind = str(keys.get("model.arch", "")).partition(":")
    if architecture not in ARCHITECTURES:
        known = ", ".join(ARCHITECTURES)
        raise SettingsError(f"model.arch is {keys.get('model.arch')!r}; known here: {known}")
    path = str(keys.get("model.name_or_path", ""))
    try:
        base = find_base_or_folder(path)
    except UnknownBase as error:
        raise SettingsError(f"model.name_or_path: {error}") from error
    if base.family != ARCHITECTURES[architecture]:
        raise SettingsError(f"model.arch is {architecture}, but name_or_path is {base.name}")
    found.settings["base_model"] = path
    found.translated.append(f"model.name_or_path and model.arch: base_model {base.name}")
    return base


def _sample_prompts(keys: Mapping[str, Any], found: Translation) -> None:
    given = list(keys.get("sample.prompts") or [])
    for number, sample in enumerate(keys.get("sample.samples") or [], start=1):
        row = sample if isinstance(sample, dict) else {"prompt": sample}
        given.append(row.get("prompt", ""))
        if own := sorted(set(row) - {"prompt"}):
            found.near.append(
                f"sample.samples, number {number}: drawn as the others, without {', '.join(own)}"
            )
    word = str(keys.get("trigger_word") or "")
    prompts = []
    for prompt in given:
        text, *flags = str(prompt).split(" --")
        if flags:
            found.near.append(f"sample prompt {text!r}: drawn without --{' --'.join(flags)}")
        prompts.append(" ".join(text.replace("[trigger]", word).split()))
    if keys.get("train.disable_sampling"):
        prompts = []
        found.translated.append("train.disable_sampling: no sample_prompts")
    elif prompts:
        found.translated.append(
            "sample.prompts, sample.samples, and train.disable_sampling, which is off: "
            f"sample_prompts, {len(prompts)} of them"
        )
    found.settings["sample_prompts"] = tuple(prompt for prompt in prompts if prompt)


def _ema(keys: Mapping[str, Any], found: Translation) -> None:
    if keys.get("train.ema_config.use_ema"):
        decay = _number(keys.get("train.ema_config.ema_decay", 0.999))
        found.settings["ema_decay"] = decay
        found.translated.append(f"train.ema_config, use_ema and ema_decay: ema_decay {decay}")
    elif any(key.startswith("train.ema_config") for key in keys):
        found.without_effect.append("train.ema_config, use_ema and ema_decay (switched off)")


def _quantize(keys: Mapping[str, Any], found: Translation) -> None:
    if not keys.get("model.quantize"):
        return
    kind = str(keys.get("model.qtype", "qfloat8"))
    number = kind.partition("|")[0].lower()
    name = "fp8" if "float8" in number else "int8" if number.endswith("int8") else "nf4"
    found.settings["quantize"] = name
    exact = name != "nf4" and "|" not in kind
    line = f"model.quantize and model.qtype: {kind} becomes quantize {name}"
    (found.translated if exact else found.near).append(line)


def _turbo_adapter(keys: Mapping[str, Any], base: Base, found: Translation) -> None:
    path = keys.get("model.assistant_lora_path")
    if path:
        versions = {file.name: version for version, file in base.training_adapters.items()}
        wanted = versions.get(Path(str(path)).name, str(path))
        found.settings["turbo_adapter"] = wanted
        found.translated.append(f"model.assistant_lora_path: turbo_adapter {wanted}")
    elif base.distilled:
        found.near.append("no model.assistant_lora_path: the model's own turbo adapter is used")


def _process(content: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    """The job's name and its one process, with its one dataset in place of the list."""
    config = content["config"]
    processes = config.get("process") if isinstance(config, dict) else None
    if not isinstance(processes, list) or not all(isinstance(each, dict) for each in processes):
        raise SettingsError("config.process is not a list of processes, as ai-toolkit has it")
    if len(processes) != 1:
        raise SettingsError(f"config.process lists {len(processes)}; give each a file of its own")
    process = dict(processes[0])
    datasets = process.get("datasets") or []
    if not isinstance(datasets, list) or len(datasets) != 1 or not isinstance(datasets[0], dict):
        raise SettingsError(
            "datasets lists more or less than one folder; put all pictures and captions into one "
            "(several sizes go into its resolution)"
        )
    process["datasets"] = datasets[0]
    return str(config.get("name", "lora")), process


def _flat(section: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Dotted keys with their values; an empty section is a value."""
    keys: dict[str, Any] = {}
    for key, value in section.items():
        if isinstance(value, dict) and value:
            keys |= _flat(value, f"{prefix}{key}.")
        else:
            keys[f"{prefix}{key}"] = value
    return keys


def _number(value: Any) -> Any:
    """The value, as a number where YAML reads one such as 1e-4 as text."""
    if not isinstance(value, str):
        return value
    try:
        number = float(value)
    except ValueError:
        return value
    return int(number) if number.is_integer() and "." not in value else number
