"""Job files of diffusion-pipe: a TOML file, with the TOML file of its dataset.

Source: `train.py`, `utils/dataset.py` (batches: an incomplete one of a bucket is dropped),
`models/z_image.py`, `models/qwen_image.py`, `models/base.py` (LoKr, which is PEFT's),
docs/supported_models.md.
"""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from trainer.settings.inputs import SettingsError
from trainer.settings.jobs.rules import (
    base_named,
    base_of,
    bucketing,
    clipping,
    count,
    epoch,
    family_named,
    learning_rate,
    lokr,
    only_dataset,
    optimizer,
    repeats,
    shift_of_size,
    swapped_blocks,
)
from trainer.settings.jobs.translation import Program, Translation, flat
from trainer.settings.parsing import companion, parse

_KAHAN = "with Kahan sums in bfloat16"
_OPTIMIZERS = {
    "adamw": ("adamw", 0.01, None),
    "adamw_optimi": ("adamw", 0.01, f"AdamW {_KAHAN}"),
    "adamw8bit": ("adamw8bit", 0.01, None),
    "adamw8bitkahan": ("adamw8bit", 0.01, f"8-bit AdamW {_KAHAN}"),
    "prodigy": ("prodigy", 0.0, "of another package"),
}
_SCHEDULES = {
    "constant": "constant",
    "linear": ("linear", "there it ends a little above 0 after a warm-up"),
    "cosine": ("cosine", "there it ends at 1e-6"),
}
_DTYPES = {
    "": "none",
    "bfloat16": "none",
    "float8": "fp8",
    "float8_e5m2": ("fp8", "with 4 bits of exponent here"),
}
_MODEL_FILES = ("diffusion_model", "transformer_path", "diffusers_path")


def _is_job(content: Any) -> bool:
    parts = {"model", "optimizer", "dataset"}
    return isinstance(content, dict) and parts <= content.keys() and "epochs" in content


def _keys(content: Mapping[str, Any], path: Path) -> dict[str, Any]:
    """The keys of both files; those of the only directory are not prefixed."""
    if not isinstance(content["dataset"], str):
        raise SettingsError("dataset must name the dataset's TOML file")
    data = parse(companion(path, "dataset", content["dataset"]))
    if not isinstance(data, dict):
        raise SettingsError("dataset is not a TOML file with directories")
    directory = only_dataset(data.pop("directory", None), "directory")
    return flat(content) | data | directory


def _base(found: Translation) -> None:
    name = str(found.get("model.type", ""))
    family, names = family_named(found, "model.type", name)
    found.same("model.type", name, lora_targets=names.lora_targets)
    keys = [f"model.{each}" for each in _MODEL_FILES if found.get(f"model.{each}")]
    base_named(found, keys[0] if keys else "model", str(found.get(keys[0])) if keys else "", family)
    if base_of(found).distilled:
        found.settings["turbo_adapter"] = "none"
    for adapter in found.get("model.merge_adapters") or ():
        found.refuse("model.merge_adapters", f"{adapter} (only turbo_adapter is merged here)")
    rank = found.get("adapter.rank")
    if "adapter.type" not in found.keys or not rank:
        found.refuse("adapter", "then the whole model is trained; use an adapter of type lora")
    elif found.get("adapter.type") == "lokr":
        factor = "adapter.decompose_factor"
        lokr(found, "adapter.rank", rank, factor, found.get(factor, -1))
        fused = "; one for the fused q, k and v" if names.lora_targets != "all" else ""
        found.differs("adapter.type", f"lokr: there the first factor starts as 0{fused}")
    elif names.lora_targets != "all":  # its linear layers are fused there
        text = "one LoRA for the fused q, k and v there, here one for each"
        found.differs("adapter.rank", text, rank=rank)
    else:
        found.same("adapter.rank", rank=rank)
    if found.get("adapter.alpha"):
        found.refuse("adapter.alpha", "diffusion-pipe refuses it, too")


def _learning(found: Translation) -> None:
    key = "optimizer.weight_decay"
    optimizer(found, "optimizer.type", "adamw", _OPTIMIZERS, key, found.get(key))
    learning_rate(found, "optimizer.lr", 1e-3)
    torch = str(found.get("optimizer.type", "")).lower() in ("adamw", "adamw8bit")
    betas = found.get("optimizer.betas", [0.9, 0.999 if torch else 0.99])
    if betas == [0.9, 0.999]:
        found.same("optimizer.betas", "as always here")
    else:
        given = ", ".join(f"{each:g}" for each in betas)
        found.differs("optimizer.betas", f"{given}; here 0.9, 0.999")
    clipping(found, "gradient_clipping")
    found.choose("lr_scheduler", "lr_scheduler", "constant", _SCHEDULES)
    found.same("warmup_steps", lr_warmup_steps=found.get("warmup_steps", 0))


def _timesteps(found: Translation) -> None:
    key = "model.timestep_sample_method"
    table = {"logit_normal": "sigmoid", "uniform": "uniform"}
    found.choose(key, "timestep_sampling", "logit_normal", table)
    if found.get("model.flux_shift") and not found.get("model.shift"):
        shift = shift_of_size(max(_edges(found)), 4096, 1.15)
        text = f"depends on the size: {shift:g} at {max(_edges(found))}"
        found.differs("model.flux_shift", text, training_shift=shift)
    else:
        found.same("model.shift", training_shift=float(found.get("model.shift") or 1.0))


def _edges(found: Translation) -> list[int]:
    given = found.get("resolutions") or []
    sizes = [each if isinstance(each, list) else [each, each] for each in given]
    return [int(math.sqrt(width * height)) for width, height in sizes]


def _memory(found: Translation) -> None:
    key = "model.diffusion_model_dtype"
    if key not in found.keys and "model.transformer_dtype" in found.keys:
        key = "model.transformer_dtype"
    found.choose(key, "quantize", "", _DTYPES)
    on = bool(found.get("activation_checkpointing"))
    found.same("activation_checkpointing", gradient_checkpointing=on)
    swapped_blocks(found)


def _dataset(found: Translation) -> None:
    text = "images without a caption are skipped there, here they have an empty one"
    skipped = found.get("skip_empty_caption", True)
    path = str(found.keys.get("path", ""))
    found.same("path, skip_empty_caption", text if skipped else "", dataset=path)
    edges = _edges(found)
    if found.get("size_buckets"):
        found.refuse("size_buckets", "use resolutions")
    found.same("resolutions", resolution=",".join(map(str, edges)))
    bucketing(found, "enable_ar_bucket", False, "squares")
    keys = "min_ar, max_ar, num_ar_buckets"
    if found.get("enable_ar_bucket"):
        found.differs(keys, "the buckets are ours")
    else:
        found.no_effect(keys)
    if prefix := found.keys.get("caption_prefix"):
        found.same("caption_prefix", caption_prefix=str(prefix))
    if (share := found.get("uncond_fraction")) is not None:
        found.same("uncond_fraction", caption_dropout=float(share))


def _steps(found: Translation) -> None:
    batch = found.get("micro_batch_size_per_gpu", 1)
    every = found.get("gradient_accumulation_steps", 1)
    if not isinstance(batch, int):
        found.refuse("micro_batch_size_per_gpu", f"{batch} (only one size is supported)")
        batch = 1
    found.same("micro_batch_size_per_gpu", batch_size=batch)
    found.same("gradient_accumulation_steps", gradient_accumulation=every)
    steps = found.get("max_steps")
    count(found, "steps", ("max_steps", None), ("epochs", None if steps else found.get("epochs")))
    key = "checkpoint_every"
    count(found, key, ("save_every_n_steps", None), ("save_every_n_epochs", None))
    passes = found.get("num_repeats", 1)
    # A batch there is of a step. An image is in a bucket of every resolution.
    epoch(found, passes, batch * every, drop_last=True)
    repeats(found, "num_repeats", passes)


PROGRAM = Program(
    name="diffusion-pipe",
    source="8f83dbf (2026-08-20)",
    is_job=_is_job,
    keys_of=_keys,
    defaults={},
    rules=(_base, _learning, _timesteps, _memory, _dataset, _steps),
    settings={
        "output_dir": "output_dir",
        "monitoring.wandb_tracker_name": "wandb_project",
        "monitoring.wandb_run_name": "wandb_run",
    },
    switches={
        "monitoring.wandb_tracker_name": "monitoring.enable_wandb",
        "monitoring.wandb_run_name": "monitoring.enable_wandb",
    },
    only={
        "adapter.type": ("lora", "lokr"),
        "model.sigmoid_scale": (1,),
        "model.guidance": (1,),
        "model.dtype": ("bfloat16",),
        "optimizer.eps": (1e-8,),
        "pipeline_stages": (1,),
        "frame_buckets": ([1], [1, 33]),
    },
    no_effect=(
        *("dataset", "model.vae*", "model.text_encoder*", "model.cache_text_embeddings"),
        *("adapter.dtype", "save_dtype", "partition_*", "caching_batch_size", "steps_per_print"),
        *("map_num_proc", "compile", "checkpoint_every_*", "eval_*", "logging_steps", "x_axis_*"),
        *("image_eval_*", "disable_block_swap_for_eval", "video_clip_mode", "regenerate_cache"),
        *("reentrant_activation_checkpointing", "monitoring.*", "cache_shuffle_delimiter"),
        *("optimizer.stabilize", "group", "shuffle_metadata", "num_dataloader_workers"),
    ),
)
