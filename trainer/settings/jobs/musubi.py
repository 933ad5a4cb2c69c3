"""Job files of musubi-tuner: a command line, or a TOML file of its options; with a dataset's TOML.

Source: `training/parser_common.py`, `training/trainer_base.py`, `dataset/config_utils.py`,
`dataset/bucket.py`, `networks/lora_*.py`. Sections of the options' file have no meaning there.
"""

import math
import re
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from families.base import Base
from trainer.settings.inputs import SettingsError
from trainer.settings.jobs.rules import (
    alpha_is_rank,
    base_named,
    base_of,
    bucketing,
    clipping,
    control_folders,
    count,
    epoch,
    family_named,
    learning_rate,
    lokr,
    only_arguments,
    only_dataset,
    optimizer,
    pairs,
    precision,
    repeats,
    shift_of_size,
    swapped_blocks,
    trackers,
    turbo_adapter,
)
from trainer.settings.jobs.translation import Program, Translation, number
from trainer.settings.parsing import companion, parse

_SCRIPT = re.compile(r"\b(\w+)_train_network(?:\.py)?\b")
_RANK = 4  # of networks without network_dim
_OPTIMIZERS = {
    "": ("adamw", 0.01, None),
    "adamw": ("adamw", 0.01, None),
    "torch.optim.adamw": ("adamw", 0.01, None),
    "adamw8bit": ("adamw8bit", 0.01, None),
    "adafactor": ("adafactor", 0.0, None),
    "prodigyopt.prodigy": ("prodigy", 0.0, None),
}
_SCHEDULES = {
    "constant": "constant",
    "constant_with_warmup": "constant",
    "linear": "linear",
    "cosine": "cosine",
}
_SIZES = {"qwen_shift": (8192, 0.9), "flux_shift": (4096, 1.15)}  # tokens, most of `shift_of_size`
_TIMESTEPS = {
    "sigma": "uniform",  # with weighting_scheme none
    "uniform": "uniform",
    "sigmoid": "sigmoid",
    "shift": "sigmoid",
} | dict.fromkeys(_SIZES, "sigmoid")
# Arguments of the optimizers: the values that are always used here.
_OPTIMIZER_ARGS = {
    "relative_step": ("False",),
    "scale_parameter": ("False",),
    "warmup_init": ("False",),
    "betas": ("0.9,0.999", "(0.9,0.999)"),
    "eps": ("1e-8", "1e-08"),
    "d_coef": ("1", "1.0"),
    "decouple": ("True",),
}


def _is_job(content: Any) -> bool:
    if isinstance(content, str):
        return _SCRIPT.search(content) is not None
    keys = _without_sections(content) if isinstance(content, dict) else {}
    return "network_module" in keys and "dataset_config" in keys


def _without_sections(content: Mapping[str, Any]) -> dict[str, Any]:
    keys: dict[str, Any] = {}
    for key, value in content.items():
        keys |= value if isinstance(value, dict) else {key: value}
    return keys


def _keys(content: Any, path: Path) -> dict[str, Any]:
    keys = _command(content) if isinstance(content, str) else _without_sections(content)
    if own := keys.get("config_file"):
        keys = _without_sections(parse(companion(path, "config_file", own))) | keys
    if prompts := keys.get("sample_prompts"):
        keys["sample_prompts"] = companion(path, "sample_prompts", prompts)
    if "dataset_config" not in keys:
        raise SettingsError("dataset_config is missing")
    data = parse(companion(path, "dataset_config", keys["dataset_config"]))
    if not isinstance(data, dict):
        raise SettingsError("dataset_config is not a TOML file with datasets")
    return keys | data.get("general", {}) | only_dataset(data.get("datasets"), "datasets")


def _command(text: str) -> dict[str, Any]:
    """The options of a command line; one without a value is on."""
    lines, continued = re.subn(r"[\\^`][ \t\r]*\n", " ", text)
    match = _SCRIPT.search(lines)
    assert match is not None
    rest = lines[match.end() :]
    # Where lines are continued by a sign, one without it ends the command.
    reader = shlex.shlex(rest.split("\n")[0] if continued else rest, posix=True)
    reader.whitespace_split, reader.escape = True, ""  # \ is in paths
    try:
        words = list(reader)
    except ValueError as error:
        raise SettingsError(f"the command line cannot be read: {error}") from error
    keys: dict[str, Any] = {"script": match[1]}
    key = ""
    for word in words:
        if word.startswith("--"):
            key, equals, value = word[2:].partition("=")
            keys[key] = value if equals else True
        elif key:
            before = keys[key]
            keys[key] = word if before is True else [*_listed(before), word]
    return keys


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def _base(found: Translation) -> None:
    module = str(found.get("network_module", ""))
    kind = module.rpartition(".")[2]
    other = kind in ("lokr", "loha")  # which say no model; the script does
    name = "" if other else module.rpartition(".lora_")[2]
    name = name or str(found.get("script", "")) or module
    family, names = family_named(found, "network_module", name)
    found.same("network_module", module, lora_targets=names.lora_targets)
    base = base_named(found, "dit", str(found.get("dit", "")), family)
    if script := found.get("script"):
        found.same("script", str(script))
    _version(found, base)
    weights = _listed(found.get("base_weights") or [])
    if len(weights) > 1:
        found.refuse("base_weights", f"{len(weights)} files (only a training adapter is supported)")
    elif weights:
        text = (
            "merged for training only; musubi-tuner also keeps it in samples, and since 2026-04-17 "
            "ignores files with lora_A and lora_B"
        )
        turbo_adapter(found, "base_weights", weights[0], text)
    elif base.distilled:
        found.same("base_weights", "no training adapter, as there", turbo_adapter="none")
    rank = found.get("network_dim", _RANK)
    if kind == "lokr":
        args = pairs(found, "network_args")
        factor = number(args.pop("factor", -1))
        ranked = lokr(found, "network_dim", rank, "network_args", factor)
        only_arguments(found, "network_args", args, {})
    else:
        ranked = True
        found.same("network_dim", rank=rank, **({"adapter": kind} if other else {}))
    if ranked:
        alpha_is_rank(found, "network_alpha", rank, 1)
    else:
        found.no_effect("network_alpha", "both factors are whole")


def _version(found: Translation, base: Base) -> None:
    """Whether the options name the same editing model as the file."""
    version = str(found.get("model_version", "original"))
    if found.get("edit_plus"):
        version = "edit-2509"
    elif found.get("edit"):
        version = "edit"
    edits = f"qwen-image-{version}" == base.name
    if edits or (version == "original" and not base.needs_references):
        found.same("model_version, edit_plus, edit", version)
    else:
        found.refuse("model_version, edit_plus, edit", f"{version} (the model is {base.name})")


def _dataset(found: Translation) -> None:
    key = "image_jsonl_file" if "image_jsonl_file" in found.keys else "image_directory"
    found.same(key, dataset=str(found.keys.get(key, "")))
    if folder := found.keys.get("control_directory"):
        control_folders(found, "control_directory", [folder])
    if base_of(found).most_references:
        if not found.get("no_resize_control") and "control_resolution" not in found.keys:
            text = "the target's size there; about 1 megapixel here, as at inference"
            found.differs("control_resolution", text)
    size = found.get("resolution", [960, 544])
    width, height = size if isinstance(size, list) else (size, size)
    edge = int(math.sqrt(width * height))
    if width == height:
        found.same("resolution", resolution=str(edge))
    else:
        text = f"{width} x {height} is an area, that of a square with this edge"
        found.differs("resolution", text, resolution=str(edge))
    bucketing(found, "enable_bucket", False, "one size")
    found.same("batch_size", batch_size=found.get("batch_size", 1))


def _learning(found: Translation) -> None:
    args = pairs(found, "optimizer_args")
    decay = number(args.pop("weight_decay", None))
    ours = optimizer(found, "optimizer_type", "", _OPTIMIZERS, "optimizer_args", decay)
    if ours == "adafactor":
        args = {"relative_step": "True", "scale_parameter": "True"} | args  # the defaults
    only_arguments(found, "optimizer_args", args, _OPTIMIZER_ARGS)
    learning_rate(found, "learning_rate", 2e-6)
    clipping(found, "max_grad_norm")
    found.choose("lr_scheduler", "lr_scheduler", "constant", _SCHEDULES)
    found.same("gradient_accumulation_steps", gradient_accumulation=_accumulation(found))


def _accumulation(found: Translation) -> int:
    return found.get("gradient_accumulation_steps", 1)


def _timesteps(found: Translation) -> None:
    given = found.get("timestep_sampling", "sigma")
    shift = 1.0
    if given in ("sigma", "shift"):
        shift = float(found.get("discrete_flow_shift", 1.0))
        found.same("discrete_flow_shift", training_shift=shift)
    elif given in _SIZES:
        shift = shift_of_size(int(found.settings["resolution"]), *_SIZES[given])
        found.differs(
            "timestep_sampling",
            f"{given} depends on the size: {shift:g} at {found.settings['resolution']}",
            timestep_sampling="sigmoid",
            training_shift=shift,
        )
        return
    found.choose("timestep_sampling", "timestep_sampling", "sigma", _TIMESTEPS)


def _memory(found: Translation) -> None:
    trackers(found, "log_with")
    if found.get("fp8_scaled"):
        found.differs("fp8_scaled", "8-bit floats with a scale for each block", quantize="fp8")
        found.same("fp8_base", "on")
    elif found.get("fp8_base"):
        found.differs("fp8_base", "8-bit floats without scales", quantize="fp8")
    found.same(
        "gradient_checkpointing",
        gradient_checkpointing=bool(found.get("gradient_checkpointing")),
    )
    swapped_blocks(found)
    precision(found, "mixed_precision", "float32")


def _steps(found: Translation) -> None:
    epochs = found.get("max_train_epochs")
    count(found, "steps", ("max_train_steps", 1600), ("max_train_epochs", None))
    count(found, "checkpoint_every", ("save_every_n_steps", None), ("save_every_n_epochs", None))
    count(found, "sample_every", ("sample_every_n_steps", None), ("sample_every_n_epochs", None))
    warmup = found.get("lr_warmup_steps", 0)
    if isinstance(warmup, str) and warmup.endswith("%"):
        warmup = float(warmup[:-1]) / 100
    if not isinstance(warmup, float):
        found.same("lr_warmup_steps", lr_warmup_steps=warmup)
    elif epochs:
        found.settings["epochs"]["lr_warmup_steps"] = warmup * epochs
        found.same("lr_warmup_steps", f"{warmup:g} of the steps")
    else:
        steps = int(warmup * found.settings["steps"])
        found.same("lr_warmup_steps", f"{warmup:g} of the steps", lr_warmup_steps=steps)
    passes, batch = found.get("num_repeats", 1), found.settings["batch_size"]
    epoch(found, passes, batch, _accumulation(found))
    repeats(found, "num_repeats", passes)


def _samples(found: Translation) -> None:
    path = found.get("sample_prompts")
    if not path:
        return
    content = parse(path)
    if not isinstance(content, str):
        found.refuse("sample_prompts", f"{path.name} (only a text file is supported)")
        return
    lines = content.splitlines()
    prompts = [line.strip() for line in lines if line.strip() and not line.startswith("#")]
    found.same("sample_prompts", f"{len(prompts)} prompts")
    found.settings["sample_prompts"] = tuple(prompts)


PROGRAM = Program(
    name="musubi-tuner",
    source="30c658c (2026-06-24)",
    is_job=_is_job,
    keys_of=_keys,
    defaults={},
    rules=(_base, _dataset, _learning, _timesteps, _memory, _steps, _samples),
    settings={
        "seed": "seed",
        "output_dir": "output_dir",
        "huggingface_repo_id": "hf_repo_id",
        "log_tracker_name": "wandb_project",
        "wandb_run_name": "wandb_run",
    },
    only={
        "weighting_scheme": ("none",),
        "sigmoid_scale": (1,),
        "base_weights_multiplier": (1,),
        "min_timestep": (0,),
        "max_timestep": (1000,),
        "caption_extension": (".txt", ".caption", ".cap", ".wd", ".tags"),
        "huggingface_repo_visibility": ("private",),
        "dynamo_backend": ("NO",),
    },
    near={
        "control_resolution": "control images have about 1 megapixel, as at inference",
        "no_resize_control": "control images have about 1 megapixel, as at inference",
    },
    # Caches, speed, other models, their logs; captions and small images are named in ours.
    no_effect=(
        *("config_file", "dataset_config", "vae", "vae_dtype", "text_encoder", "fp8_vl", "fp8_llm"),
        *("sdpa", "flash_attn", "sage_attn", "xformers", "flash3", "split_attn", "compile*"),
        *("cuda_*", "dynamo_*", "max_data_loader_n_workers", "persistent_data_loader_workers"),
        *("logging_dir", "log_prefix", "log_config", "log_tracker_config", "ddp_*"),
        *("sample_at_first", "lr_decay_steps", "lr_scheduler_num_cycles", "lr_scheduler_power"),
        *("use_pinned_memory_for_block_swap", "block_swap_*", "img_in_txt_in_offloading"),
        *("disable_numpy_memmap", "gradient_checkpointing_cpu_offload", "num_layers"),
        *("guidance_scale", "logit_mean", "logit_std", "mode_scale", "discrete_flow_shift"),
        *("preserve_distribution_shape", "show_timesteps", "no_metadata", "training_comment"),
        *("output_name", "save_last_n_*", "save_state*", "metadata_*", "async_upload"),
        *("huggingface_repo_type", "huggingface_path_in_repo", "huggingface_token"),
        *("wandb_api_key", "cache_directory", "bucket_no_upscale", "debug_dataset"),
    ),
)
