"""Converts the keys of an ai-toolkit job that depend on each other."""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from families.base import Base
from families.registry import FAMILIES, UnknownBase, family_of, find_base_or_folder
from trainer.settings.ai_toolkit_keys import (
    LEARNING_RATE,
    PRODIGY_LEAST,
    TIMESTEPS,
    UNCLIPPED,
    WARMUP,
    WEIGHT_DECAY,
)
from trainer.settings.choices import LR_SCHEDULERS, OPTIMIZERS
from trainer.settings.inputs import SettingsError


@dataclass
class Translation:
    """A converted job, with one line for each of its keys."""

    settings: dict[str, Any] = field(default_factory=dict)  # `TrainingInputs` by their names
    sample: dict[str, Any] = field(default_factory=dict)  # fields of a generation request
    translated: list[str] = field(default_factory=list)
    near: list[str] = field(default_factory=list)
    without_effect: list[str] = field(default_factory=list)
    refused: list[str] = field(default_factory=list)


def number(value: Any) -> Any:
    """The value, with text such as 1e-4, as YAML reads it, as a number; 2000.0 is 2000."""
    if isinstance(value, bool) or not isinstance(value, str | float):
        return value
    try:
        read = float(value)
    except ValueError:
        return value
    return int(read) if read.is_integer() else read


# Keys that are handled by the functions below.
TOGETHER = {
    *("training_folder", "sample.prompts", "sample.samples", "train.disable_sampling"),
    *("train.ema_config.use_ema", "train.ema_config.ema_decay", "train.ema_config"),
    *("model.name_or_path", "model.arch", "model.assistant_lora_path"),
    *("model.quantize", "model.qtype"),
    *("network.network_kwargs.only_if_contains", "network.network_kwargs.ignore_if_contains"),
    *("network.network_kwargs", "train.dtype", "train.optimizer", "train.lr", "train.unet_lr"),
    *("train.optimizer_params.weight_decay", "train.max_grad_norm", "train.lr_scheduler"),
    *("train.lr_scheduler_params", "train.lr_scheduler_params.num_warmup_steps"),
    *("train.gradient_accumulation_steps", "train.timestep_type", "train.linear_timesteps"),
}


def base_of(keys: Mapping[str, Any], found: Translation) -> Base:
    architecture, _, kind = str(keys.get("model.arch", "")).partition(":")
    families = {each.ai_toolkit.arch: each for each in FAMILIES.values() if each.ai_toolkit}
    if architecture not in families:
        known = ", ".join(families)
        raise SettingsError(f"model.arch is {keys.get('model.arch')!r}; supported: {known}")
    path = str(keys.get("model.name_or_path", ""))
    try:
        base = find_base_or_folder(path)
    except UnknownBase as error:
        raise SettingsError(f"model.name_or_path: {error}") from error
    if base.family != families[architecture].name:
        raise SettingsError(f"model.arch is {architecture}, but name_or_path is {base.name}")
    found.settings["base_model"] = path
    found.translated.append(f"model.name_or_path and model.arch: base_model {base.name}")
    return base


def sample_prompts(keys: Mapping[str, Any], base: Base, found: Translation) -> None:
    prompts = keys.get("sample.prompts") or []
    given = [prompts] if isinstance(prompts, str) else [each for each in prompts if each]
    for place, sample in enumerate(keys.get("sample.samples") or [], start=1):
        row = sample if isinstance(sample, dict) else {"prompt": sample}
        given.append(row.get("prompt", ""))
        if own := sorted(set(row) - {"prompt"}):
            left = ", ".join(own)
            found.near.append(f"sample.samples, number {place}: generated without its {left}")
    word = str(keys.get("trigger_word") or "")
    prompts = []
    for prompt in given:
        text, *flags = str(prompt).split(" --")
        if flags:
            found.near.append(
                f"sample.prompts: {text!r} is generated without --{' --'.join(flags)}"
            )
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


def ema(keys: Mapping[str, Any], base: Base, found: Translation) -> None:
    if keys.get("train.ema_config.use_ema"):
        decay = number(keys.get("train.ema_config.ema_decay", 0.999))
        found.settings["ema_decay"] = decay
        found.translated.append(f"train.ema_config, use_ema and ema_decay: ema_decay {decay}")
    elif any(key.startswith("train.ema_config") for key in keys):
        found.without_effect.append("train.ema_config, use_ema and ema_decay (switched off)")


def quantize(keys: Mapping[str, Any], base: Base, found: Translation) -> None:
    if not keys.get("model.quantize"):
        if "model.quantize" in keys or "model.qtype" in keys:
            found.translated.append("model.quantize (off) and model.qtype: quantize none")
        return
    kind = str(keys.get("model.qtype", "qfloat8"))
    name, bar, _ = kind.partition("|")
    exact = {"qfloat8": "fp8", "float8": "fp8", "fp8": "fp8", "int8": "int8", "qint8": "int8"}
    # The others are named by their bits: uint3, convrot8, convrotint6, nvfp4, bitnet (1.58).
    bits = re.search(r"\d+$", name)
    if name in exact:
        ours = exact[name]
    elif "float8" in name or "fp8" in name:  # float8_e4m3fn
        ours = "fp8"
    elif "bitnet" in name or (bits is not None and int(bits[0]) <= 5):
        ours = "nf4"
    elif bits is not None and int(bits[0]) <= 8:
        ours = "int8"
    else:
        found.refused.append(f"model.qtype: {kind} (supported: {', '.join(exact)}, or N bits)")
        return
    found.settings["quantize"] = ours
    if name in exact and not bar:
        found.translated.append(f"model.quantize and model.qtype: {kind} becomes quantize {ours}")
        return
    what = " (rotated)" if "convrot" in name else " with a recovery adapter" if bar else ""
    found.near.append(f"model.qtype: {kind}{what} becomes quantize {ours}")


def lora_targets(keys: Mapping[str, Any], base: Base, found: Translation) -> None:
    """Converts parts of layers' names to our patterns, also only within the blocks."""
    prefix = "network.network_kwargs."
    only = keys.get(prefix + "only_if_contains")
    without = keys.get(prefix + "ignore_if_contains")
    family = family_of(base)
    groups, blocks = family.ai_toolkit.groups if family.ai_toolkit else {}, family.trunk

    def patterns(parts: Any) -> list[str]:
        found = []
        for part in [parts] if isinstance(parts, str) else list(parts):
            # "$$" is the separator in their names during training.
            part = str(part).replace("$$", ".").removeprefix("transformer.")
            part = groups.get(part.strip("."), part)
            inside = part.startswith(f"{blocks}.") or part in groups.values()
            found.append(
                part if part in groups.values() else f"{'' if inside else blocks + '.*'}{part}*"
            )
        return found

    chosen = patterns(only) if only else []
    left = [f"!{each}" for each in patterns(without)] if without else []
    if chosen or left:
        found.settings["lora_targets"] = ",".join([*(chosen or ["all"]), *left])
    named = [
        key.removeprefix(prefix)
        for key in (prefix + "only_if_contains", prefix + "ignore_if_contains")
        if key in keys
    ]
    found.translated.append(
        f"{' and '.join(['layers', *named])}: lora_targets {found.settings['lora_targets']}"
    )
    for empty in ("network.network_kwargs", "train.lr_scheduler_params"):
        if empty in keys:
            found.without_effect.append(f"{empty} (empty)")


def dtype(keys: Mapping[str, Any], base: Base, found: Translation) -> None:
    given = keys.get("train.dtype")
    if given in ("bf16", "bfloat16"):
        found.translated.append(f"train.dtype: {given}, as always here on a GPU")
    else:
        state = f": {given}" if given is not None else " (missing): float32 in ai-toolkit"
        found.near.append(f"train.dtype{state}; here the base is bfloat16 on a GPU")


def optimizer(keys: Mapping[str, Any], base: Base, found: Translation) -> None:
    """optimizer, weight_decay and max_grad_norm."""
    given = str(keys.get("train.optimizer", "adamw")).lower()
    name = "prodigy" if given.startswith("prodigy") else given
    if name not in OPTIMIZERS:
        known = ", ".join(OPTIMIZERS)
        found.refused.append(f"train.optimizer: {given} (supported: {known})")
        name = "adamw"  # to check the other keys too
    found.settings["optimizer"] = name
    line = f"train.optimizer: {given} becomes optimizer {name}"
    (found.near if given.endswith("8bit") and name == "prodigy" else found.translated).append(line)

    key = "train.optimizer_params.weight_decay"
    decay = number(keys.get(key))
    decay = WEIGHT_DECAY.get(name, 0.01) if decay is None else decay
    found.settings["weight_decay"] = decay
    found.translated.append(f"{key}{' (missing)' * (key not in keys)}: weight_decay {decay}")

    norm = number(keys.get("train.max_grad_norm", 1.0))
    if name == "adafactor":
        found.settings["max_grad_norm"] = UNCLIPPED
        found.near.append(
            f"train.max_grad_norm: ai-toolkit does not clip with adafactor: {UNCLIPPED:g} here"
        )
    elif not norm:
        found.settings["max_grad_norm"] = UNCLIPPED
        found.translated.append(f"train.max_grad_norm: 0 is no clipping: {UNCLIPPED:g} here")
    else:
        found.settings["max_grad_norm"] = norm
        found.translated.append(f"train.max_grad_norm: max_grad_norm {norm}")


def learning_rate(keys: Mapping[str, Any], base: Base, found: Translation) -> None:
    key = next((each for each in ("train.unet_lr", "train.lr") if each in keys), None)
    rate = LEARNING_RATE if key is None else number(keys[key])
    if not isinstance(rate, (int, float)):
        found.refused.append(f"{key}: {rate} (not a number)")
        return
    if OPTIMIZERS[found.settings["optimizer"]].finds_rate and rate < PRODIGY_LEAST:
        found.settings["learning_rate"] = 1.0
        found.near.append(f"{key or 'train.lr (missing)'}: {rate:g} becomes 1.0, as in ai-toolkit")
        return
    found.settings["learning_rate"] = rate
    if key is None:
        found.near.append(
            f"train.lr (missing): {rate:g} in ai-toolkit, which hardly trains; 1e-4 is usual"
        )
    else:
        found.translated.append(f"{key}: learning_rate {rate}")
    if key == "train.unet_lr" and "train.lr" in keys:
        found.without_effect.append("train.lr (unet_lr is given)")


def lr_scheduler(keys: Mapping[str, Any], base: Base, found: Translation) -> None:
    given = keys.get("train.lr_scheduler", "constant")
    warmup = number(keys.get("train.lr_scheduler_params.num_warmup_steps"))
    if given == "constant_with_warmup":
        found.settings["lr_scheduler"] = "constant"
        found.settings["lr_warmup_steps"] = steps = WARMUP if warmup is None else warmup
        found.translated.append(
            "train.lr_scheduler: constant_with_warmup and its num_warmup_steps: "
            f"lr_scheduler constant, lr_warmup_steps {steps}"
        )
    elif given == "linear":
        found.refused.append(
            "train.lr_scheduler: linear (in ai-toolkit the rate rises from a third to the whole, "
            "here it falls to 0; constant is more similar)"
        )
    elif given not in LR_SCHEDULERS:
        known = ", ".join(sorted({*LR_SCHEDULERS, "constant_with_warmup"} - {"linear"}))
        found.refused.append(f"train.lr_scheduler: {given} (supported: {known})")
    else:
        found.settings["lr_scheduler"] = given
        found.translated.append(f"train.lr_scheduler: lr_scheduler {given}")
    if warmup is not None and given != "constant_with_warmup":
        found.refused.append(f"train.lr_scheduler_params.num_warmup_steps: {warmup}")


def accumulation(keys: Mapping[str, Any], base: Base, found: Translation) -> None:
    """The older key of ai-toolkit, which clears gradients in every step: only one batch counts."""
    key = "train.gradient_accumulation_steps"
    every = number(keys.get(key, 1))
    if every == 1:
        if key in keys:
            found.translated.append(f"{key}: 1, as always here")
    elif not isinstance(every, int) or every < 1:
        found.refused.append(f"{key}: {every}")
    else:
        steps = max(1, found.settings["steps"] // every)
        found.settings["steps"] = steps
        found.near.append(
            f"{key}: {every}: ai-toolkit updates every {every} steps with only the last batch, so "
            f"{steps} updates; for {every} batches per update set gradient_accumulation"
        )


def timesteps(keys: Mapping[str, Any], base: Base, found: Translation) -> None:
    """timestep_type, and linear_timesteps, which has priority."""
    linear = keys.get("train.linear_timesteps")
    key = "train.linear_timesteps" if linear else "train.timestep_type"
    if key in keys:
        given = "linear" if linear else keys[key]
        if given in TIMESTEPS:
            name, difference = TIMESTEPS[given]
            found.settings["timestep_sampling"] = name
            line = f"{key}: {keys[key]} becomes timestep_sampling {name}"
            if difference:
                found.near.append(f"{line}: {difference}")
            else:
                found.translated.append(line)
        else:
            found.refused.append(f"{key}: {given} (supported: {', '.join(TIMESTEPS)})")
    if linear and "train.timestep_type" in keys:
        found.without_effect.append("train.timestep_type (while linear_timesteps is on)")
    elif "train.linear_timesteps" in keys and not linear:
        found.without_effect.append("train.linear_timesteps (switched off)")


def turbo_adapter(keys: Mapping[str, Any], base: Base, found: Translation) -> None:
    path = keys.get("model.assistant_lora_path")
    if path:
        versions = {file.name: version for version, file in base.training_adapters.items()}
        wanted = versions.get(Path(str(path)).name, str(path))
        found.settings["turbo_adapter"] = wanted
        found.translated.append(f"model.assistant_lora_path: turbo_adapter {wanted}")
    elif base.distilled:
        found.near.append("no model.assistant_lora_path: the model's training adapter is used")


# In order: some need results of earlier ones.
RULES: tuple[Callable[[Mapping[str, Any], Base, Translation], None], ...] = (
    sample_prompts,
    ema,
    quantize,
    turbo_adapter,
    timesteps,
    lora_targets,
    dtype,
    optimizer,
    learning_rate,
    lr_scheduler,
    accumulation,
)
