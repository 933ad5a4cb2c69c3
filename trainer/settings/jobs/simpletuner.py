"""Job files of SimpleTuner: config.json, with the JSON file of its datasets.

Source: the field registry (defaults), `helpers/models/common.py`, `helpers/models/*/model.py`,
`helpers/training/optimizer_param.py`, `helpers/training/custom_schedule.py`,
`helpers/metadata/backends/base.py` (batches), documentation/DATALOADER.md.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from families.registry import family_of
from trainer.settings.inputs import SettingsError
from trainer.settings.jobs.lycoris import keys_of_lycoris, lycoris
from trainer.settings.jobs.rules import (
    alpha_is_rank,
    base_named,
    base_of,
    clipping,
    control_folders,
    count,
    epoch,
    family_named,
    learning_rate,
    only_arguments,
    only_dataset,
    optimizer,
    pairs,
    precision,
    repeats,
    trackers,
)
from trainer.settings.jobs.translation import Program, Translation
from trainer.settings.parsing import companion, parse

_KAHAN = "with Kahan sums in bfloat16"
_OPTIMIZERS = {
    "adamw_bf16": ("adamw", 0.01, "its state is bfloat16 and eps 1e-6"),
    "torch-adamw": ("adamw", 0.01, None),
    "bnb-adamw": ("adamw", 0.01, None),
    "optimi-adamw": ("adamw", 0.01, _KAHAN),
    "bnb-adamw8bit": ("adamw8bit", 0.01, None),
    "ao-adamw8bit": ("adamw8bit", 0.01, "another 8-bit format"),
    "prodigy": ("prodigy", 0.0, None),
}
_OPTIMIZER_ARGS = {"betas": ("0.9,0.999", "(0.9,0.999)"), "eps": ("1e-6", "1e-8"), "d_coef": ("1",)}
_SCHEDULES = {"constant_with_warmup": "constant", "constant": "constant", "linear": "linear"}
_QUANTIZATIONS = {
    "no_change": "none",
    **dict.fromkeys(("int8-quanto", "int8-torchao", "int8-sdnq"), "int8"),
    **dict.fromkeys(("fp8-quanto", "fp8-torchao", "fp8-sdnq", "fp8wo-torchao"), "fp8"),
    "nf4-bnb": "nf4",
    "uint8-sdnq": ("int8", "signed integers here"),
    **dict.fromkeys(
        ("int4-quanto", "int4-torchao", "uint4-sdnq", "int2-quanto", "uint3-sdnq", "uint2-sdnq"),
        ("nf4", "4 bits of another format"),
    ),
}


def _is_job(content: Any) -> bool:
    return isinstance(content, dict) and bool({"model_family", "--model_family"} & content.keys())


def _keys(content: Mapping[str, Any], path: Path) -> dict[str, Any]:
    """The keys of both files; those of the only dataset replace those of the job."""
    keys = {key.removeprefix("--"): value for key, value in content.items()}
    name = keys.get("data_backend_config")
    if not name:
        raise SettingsError("data_backend_config is missing")
    datasets = parse(companion(path, "data_backend_config", name))
    if not isinstance(datasets, list) or not all(isinstance(each, dict) for each in datasets):
        raise SettingsError("data_backend_config is not a list of datasets")
    used = [each for each in datasets if not (each.get("disabled") or each.get("disable"))]
    images = [each for each in used if each.get("dataset_type", "image") == "image"]
    others = [each for each in used if each.get("dataset_type") not in (None, "image")]
    caches = {f"dataset {each.get('id')}.{key}": each[key] for each in others for key in each}
    if keys.get("lora_type") == "lycoris":
        keys |= keys_of_lycoris(path, keys.get("lycoris_config"))
    return keys | only_dataset(images, "data_backend_config") | caches


def _base(found: Translation) -> None:
    name = str(found.get("model_family", ""))
    family, names = family_named(found, "model_family", name)
    found.same("model_family", name, lora_targets=names.lora_targets)
    flavour = str(found.get("model_flavour", ""))
    base, adapter = names.flavours.get(flavour, (None, None))
    if base is None:
        found.refuse("model_flavour", f"{flavour} (supported: {', '.join(names.flavours)})")
        base = family.bases[0].name
    found.same("model_flavour", flavour, base_model=base)
    if adapter and not found.get("disable_assistant_lora"):
        found.same("assistant_lora_path", turbo_adapter=adapter)
    elif base_of(found).distilled:
        found.same("disable_assistant_lora", turbo_adapter="none")
    if path := found.get("pretrained_model_name_or_path"):
        base_named(found, "pretrained_model_name_or_path", str(path), family)
    if found.get("lora_type") == "lycoris":
        lycoris(found, names)
        return
    if targets := found.get("peft_lora_target_modules"):
        found.same(
            "peft_lora_target_modules",
            lora_targets=",".join(targets) if isinstance(targets, list) else str(targets),
        )
    rank = found.get("lora_rank", 16)
    found.same("lora_rank", rank=rank)
    alpha_is_rank(found, "lora_alpha", rank, rank)
    if found.get("use_dora"):
        found.same("use_dora", adapter="dora")
    if dropout := found.get("lora_dropout", 0.1):
        found.differs("lora_dropout", f"{dropout:g} in SimpleTuner; there is none here")


def _learning(found: Translation) -> None:
    args = pairs(found, "optimizer_config")
    decay = args.pop("weight_decay", None) or found.get("adam_weight_decay")
    decay = None if decay is None else float(decay)
    optimizer(found, "optimizer", "adamw_bf16", _OPTIMIZERS, "adam_weight_decay", decay)
    only_arguments(found, "optimizer_config", args, _OPTIMIZER_ARGS)
    learning_rate(found, "learning_rate", 4e-7)
    clipping(found, "max_grad_norm", 2.0)
    if found.get("grad_clip_method", "value") == "value":
        found.same("grad_clip_method", "each value there, the norm here")
    if str(found.get("lr_scheduler")) in ("cosine", "sine", "cosine_with_restarts"):
        text = "a wave whose length is lr_warmup_steps; ours falls once (constant is more similar)"
        found.refuse("lr_scheduler", f"{found.get('lr_scheduler')}: {text}")
    else:
        found.choose("lr_scheduler", "lr_scheduler", "constant_with_warmup", _SCHEDULES)
    if found.get("use_ema"):
        found.same("use_ema, ema_decay", ema_decay=found.get("ema_decay", 0.995))
    else:
        found.no_effect("use_ema, ema_decay", "switched off")
    shift = float(found.get("flow_schedule_shift", 3.0))
    uniform = found.get("flow_use_uniform_schedule")
    found.same(
        "flow_schedule_shift, flow_use_uniform_schedule",
        timestep_sampling="uniform" if uniform else "sigmoid",
        training_shift=shift or 1.0,
    )


def _memory(found: Translation) -> None:
    trackers(found, "report_to")
    found.choose("base_model_precision", "quantize", "no_change", _QUANTIZATIONS)
    checkpointing = bool(found.get("gradient_checkpointing", True))
    found.same("gradient_checkpointing", gradient_checkpointing=checkpointing)
    for key in ("musubi_blocks_to_swap", "enable_group_offload", "ramtorch"):
        if found.get(key):
            found.differs(key, str(found.get(key)), low_memory=True)
    precision(found, "mixed_precision", "bf16")


def _dataset(found: Translation) -> None:
    found.same("instance_data_dir", dataset=str(found.keys.get("instance_data_dir", "")))
    linked = found.keys.get("conditioning_data") or []
    linked = [linked] if isinstance(linked, str) else list(linked)
    folders = [found.keys.get(f"dataset {each}.instance_data_dir") for each in linked]
    if linked and not all(folders):
        found.refuse("conditioning_data", f"{linked} (a dataset without instance_data_dir)")
    elif linked:
        control_folders(found, "conditioning_data", folders)
        kinds = {str(found.keys.get(f"dataset {each}.conditioning_type")) for each in linked}
        if base_of(found).most_references and kinds - {"reference_strict"}:
            text = "control images of another aspect ratio than the image's are never cropped here"
            found.differs("conditioning_data", f"{', '.join(sorted(kinds))}: {text}")
    size, kind = found.get("resolution", 1024), found.get("resolution_type", "pixel_area")
    edge = int(size) if kind != "area" else round((size * 1e6) ** 0.5 / 64) * 64
    found.same("resolution", resolution=str(edge))
    if kind == "pixel":
        text = "the shorter edge there, here the edge of a square with the image's area"
        found.differs("resolution_type", f"pixel: {text}")
    else:
        found.same("resolution_type", str(kind))
    if found.get("crop"):
        text = "images are not cropped to another aspect ratio here; crop them, and set it to false"
        found.refuse("crop", f"True ({text})")
    strategy = found.get("caption_strategy", "filename")
    if strategy == "instanceprompt":
        text = "captions of files are used here, where there are any"
        prompt = str(found.keys.get("instance_prompt") or "")
        found.differs("caption_strategy, instance_prompt", text, default_caption=prompt)
    elif strategy == "textfile":
        found.same("caption_strategy", "NAME.txt, whose lines are joined")
    else:
        found.refuse("caption_strategy", f"{strategy} (write captions into NAME.txt)")
    dropout = float(found.get("caption_dropout_probability", 0.1))
    found.same("caption_dropout_probability", caption_dropout=dropout)


def _steps(found: Translation) -> None:
    batch, every = found.get("train_batch_size", 4), found.get("gradient_accumulation_steps", 1)
    found.same("train_batch_size", batch_size=batch)
    found.same("gradient_accumulation_steps", gradient_accumulation=every)
    steps = found.get("max_train_steps")
    epochs = None if steps else found.get("num_train_epochs", 1)
    count(found, "steps", ("max_train_steps", None), ("num_train_epochs", epochs))
    saved = "checkpoint_step_interval"
    if saved not in found.keys and "checkpointing_steps" in found.keys:
        saved = "checkpointing_steps"
    count(found, "checkpoint_every", (saved, 500), ("checkpoint_epoch_interval", None))
    found.same("lr_warmup_steps", lr_warmup_steps=found.get("lr_warmup_steps", 0))
    passes = int(found.get("repeats", 0)) + 1  # repeats after the first pass
    epoch(found, passes, batch, every)
    repeats(found, "repeats", passes)


def _samples(found: Translation) -> None:
    prompt = found.keys.get("validation_prompt")
    if not prompt:
        return
    found.settings["sample_prompts"] = (str(prompt),)
    found.same("validation_prompt", "sample_prompts")
    every = "validation_steps" if "validation_steps" in found.keys else "validation_step_interval"
    count(found, "sample_every", (every, 100), ("validation_epoch_interval", None))
    size = str(found.keys.get("validation_resolution") or "").lower()
    width, x, height = size.partition("x")
    if width.isdecimal() and (height.isdecimal() or not x):
        found.sample |= {"width": int(width), "height": int(height or width)}
        found.same("validation_resolution", size)
    guidance = found.get("validation_guidance")
    if guidance is not None:  # the pipeline's own scale
        off = family_of(base_of(found)).card_code.guidance_off
        found.sample["guidance_scale"] = scale = max(1, guidance + 1 - off)
        found.same("validation_guidance", f"guidance_scale {scale:g}")


PROGRAM = Program(
    name="SimpleTuner",
    source="bc8e6ab7 (2026-08-22)",
    is_job=_is_job,
    keys_of=_keys,
    defaults={},
    rules=(_base, _learning, _memory, _dataset, _steps, _samples),
    settings={
        "seed": "seed",
        "output_dir": "output_dir",
        "hub_model_id": "hf_repo_id",
        "tracker_project_name": "wandb_project",
        "tracker_run_name": "wandb_run",
    },
    sample={
        "validation_num_inference_steps": "num_inference_steps",
        "validation_seed": "seed",
        "validation_negative_prompt": "negative_prompt",
    },
    switches={
        "hub_model_id": "push_to_hub",
        "crop_style": "crop",
        "crop_aspect": "crop",
        "noise_offset": "offset_noise",
        "noise_offset_probability": "offset_noise",
    },
    only={
        "model_type": ("lora",),
        "lora_type": ("standard", "lycoris"),
        "lycoris.multiplier": (1,),
        "type": ("local",),
        "dataset_type": ("image",),
        "metadata_backend": ("discovery",),
        "prediction_type": ("flow_matching",),
        "loss_type": ("l2",),
        "flow_sigmoid_scale": (1,),
        "probability": (1,),
        "assistant_lora_strength": (1,),
        "adam_beta1": (0.9,),
        "adam_beta2": (0.999,),
        "lora_init_type": ("default",),
        "grad_clip_method": ("norm", "value"),
    },
    near={
        "maximum_image_size": "images are scaled once",
        "target_downsample_size": "images are scaled once",
    },
    no_effect=(
        *("data_backend_config", "id", "dataset *", "cache_*", "skip_file_discovery", "default"),
        *("preserve_data_backend_cache", "compress_disk_cache", "vae_*", "text_*", "write_batch_*"),
        *("read_batch_size", "image_processing_batch_size", "aspect_bucket_*", "metadata_update_*"),
        *("disable_bucket_pruning", "delete_*", "max_workers", "torch_num_threads", "dataloader_*"),
        *("checkpoints_*", "checkpointing_*", "resume_from_checkpoint", "logging_dir", "webhook_*"),
        *("push_to_hub*", "push_checkpoints_to_hub", "model_card_*", "lora_format"),
        *("validation_*", "num_eval_images", "eval_*", "user_prompt_library", "hub_*", "dynamo_*"),
        *("attention_mechanism", "quantize_via", "sdnq_*", "base_model_default_dtype", "num_*"),
        *("gradient_checkpointing_*", "ramtorch_*", "group_offload_*", "musubi_block_swap_*"),
        *("offload_during_*", "accelerator_cache_*", "disable_tf32", "set_grads_to_none"),
        *("print_*", "strict_epoch_limit", "minimum_image_size", "resolution_type", "lr_end"),
        *("i_know_what_i_am_doing", "keep_vae_loaded", "ignore_missing_files", "revision"),
        *("debug_*", "lr_power", "lr_num_cycles", "lycoris_config", "instance_prompt", "ema_*"),
        *("lycoris.bypass_mode", "lycoris.conv_*", "lycoris.use_tucker", "lycoris.block_size"),
        *("lycoris.apply_preset.enable_conv", "lycoris.apply_preset.lora_prefix"),
        *("seed_for_each_device", "disable_segmented_timestep_sampling", "enable_watermark"),
    ),
)
