"""Job files of OneTrainer: the JSON file of a configuration, as its interface saves it.

Source: `modules/util/config/TrainConfig.py` and `ConceptConfig.py` (defaults, older names),
`modules/util/optimizer_util.py`, `modules/util/create.py` (schedules), `modules/modelSetup`, and
mgds `AspectBatchSorting.py` (an incomplete batch of a bucket is dropped).
"""

from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import Any

from trainer.settings.jobs.rules import (
    UNLIMITED,
    alpha_is_rank,
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
    precision,
)
from trainer.settings.jobs.translation import Program, Translation, edges, flat
from trainer.settings.parsing import companion, parse

_OPTIMIZERS = {
    "adamw": ("adamw", 0.01, None),
    "adamw_8bit": ("adamw8bit", 0.01, None),
    "adafactor": ("adafactor", 0.0, None),
    "prodigy": ("prodigy", 0.0, None),
}
_SCHEDULES = {"constant": "constant", "linear": "linear", "cosine": "cosine"}
_QUANTIZATIONS = {
    "bfloat_16": "none",
    "float_32": ("none", "bfloat16 on a GPU here"),
    "float_16": ("none", "bfloat16 on a GPU here"),
    "float_8": "fp8",
    "int_8": "int8",
    "nfloat_4": "nf4",
    "float_w8a8": ("fp8", "activations are not quantized"),
    "int_w8a8": ("int8", "activations are not quantized"),
}
_LAYERS = "layer_filter"
_PRESETS = {"blocks": "all", "attn-mlp": "auto", "attn-only": "attention"}  # by layer_filter_preset
_OLD = {  # older names of keys
    "lora_layers": _LAYERS,
    "lora_layer_preset": "layer_filter_preset",
    "lora_layers_regex": "layer_filter_regex",
    "save_after": "save_every",
    "save_after_unit": "save_every_unit",
    "layer_offload_fraction": "transformer.offload_fraction",
    "concepts.repeats": "concepts.balancing",
}


def _is_job(content: Any) -> bool:
    return isinstance(content, dict) and {"training_method", "model_type"} <= content.keys()


def _keys(content: Mapping[str, Any], path: Path) -> dict[str, Any]:
    """The keys, with the only concept instead of the list."""
    keys = dict(content)
    concepts = keys.pop("concepts", None)
    if concepts is None:  # presets have none
        name = keys.get("concept_file_name")
        concepts = parse(companion(path, "concept_file_name", name)) if name else [{}]
    if isinstance(concepts, list):
        concepts = [each for each in concepts if each.get("enabled", True)]
    found = flat(keys | {"concepts": only_dataset(concepts, "concepts")})
    return {
        _OLD[key] if key in _OLD and _OLD[key] not in found else key: value
        for key, value in found.items()
    }


def _base(found: Translation) -> None:
    name = str(found.get("model_type", ""))
    family, _ = family_named(found, "model_type", name)
    found.same("model_type", name)
    key = "transformer.model_name" if found.get("transformer.model_name") else "base_model_name"
    base_named(found, key, str(found.get(key, "")), family)
    if key != "base_model_name":
        found.no_effect("base_model_name", "transformer.model_name is given")
    if base_of(found).distilled:
        found.settings["turbo_adapter"] = "none"  # OneTrainer has none
    rank = found.get("lora_rank", 16)
    _form(found, rank)
    folder = PurePosixPath(str(found.get("output_model_destination", "models/model.safetensors")))
    text = f"{folder.name} is not used: the result is weights.zip"
    found.same("output_model_destination", text, output_dir=str(folder.parent))


def _form(found: Translation, rank: int) -> None:
    """The form of the LoRA and its size: `peft_type`, and DoRA by `lora_decompose`."""
    kind, dora = str(found.get("peft_type", "LORA")).lower(), bool(found.get("lora_decompose"))
    ranked = True
    if kind == "lokr":
        rank = UNLIMITED if found.get("lokr_full_matrix") else found.get("lokr_dim", rank)
        factor = found.get("lokr_decompose_factor", -1)
        ranked = lokr(found, "lokr_dim", rank, "lokr_decompose_factor", factor)
        found.no_effect("lora_rank", "LoKr has lokr_dim")
        for switch in ("lokr_decompose_both", "lokr_weight_decompose"):
            if found.get(switch):
                found.refuse(switch, "on")
    elif kind in ("lora", "loha") and not (dora and kind == "loha"):
        form = "dora" if dora else kind
        found.same("lora_rank", rank=rank, **({} if form == "lora" else {"adapter": form}))
        if dora:
            rows = found.get("lora_decompose_output_axis")
            report = found.same if rows else found.differs
            text = "norms of rows" if rows else "norms of columns there, of rows here"
            report("lora_decompose, lora_decompose_output_axis", text)
    else:
        found.refuse("peft_type", f"{kind.upper()}{' with lora_decompose' * dora}")
    if "peft_type" in found.keys and "peft_type" not in found.named:
        found.same("peft_type", kind.upper())
    if ranked:
        alpha_is_rank(found, "lora_alpha", rank, 1)
    else:
        found.no_effect("lora_alpha", "both factors are whole")


def _layers(found: Translation) -> None:
    """Layers by a preset, or by parts of their names."""
    family, _ = family_named(found, "model_type", str(found.get("model_type", "")))
    preset, given = found.get("layer_filter_preset", "full"), str(found.get(_LAYERS, ""))
    parts = [part.strip() for part in given.split(",") if part.strip()]
    if preset in _PRESETS:
        targets = _PRESETS[preset]
    elif not parts:
        targets = "*"
    elif found.get("layer_filter_regex"):
        # Which layers one means is only known when the model's own are.
        if "lora_targets" in found.given:
            found.no_effect(f"{_LAYERS}, layer_filter_preset, layer_filter_regex", "lora_targets")
        else:
            text = "a regular expression; name the layers with --lora-targets, where * is any text"
            found.refuse(_LAYERS, f"{given} ({text})")
        return
    else:
        targets = ",".join(f"*{part}*" for part in parts)
    found.same("layer_filter_preset, layer_filter_regex", str(preset))
    if family.idle_in_last_block and preset in _PRESETS:
        text = f"without {len(family.idle_in_last_block)} layers of the last block with no effect"
        found.differs(_LAYERS, text, lora_targets=targets)
    else:
        found.same(_LAYERS, given, lora_targets=targets)


def _learning(found: Translation) -> None:
    key = "optimizer.optimizer"
    decay = found.get("optimizer.weight_decay")
    optimizer(found, key, "adamw", _OPTIMIZERS, "optimizer.weight_decay", decay)
    learning_rate(found, "learning_rate", 3e-6)
    clipping(found, "clip_grad_norm")
    found.choose("learning_rate_scheduler", "lr_scheduler", "constant", _SCHEDULES)
    every = found.get("gradient_accumulation_steps", 1)
    found.same("gradient_accumulation_steps", gradient_accumulation=every)
    if found.get("ema", "OFF") != "OFF":
        found.same("ema, ema_decay", ema_decay=found.get("ema_decay", 0.999))
    else:
        found.no_effect("ema, ema_decay", "switched off")


def _timesteps(found: Translation) -> None:
    weight, bias = found.get("noising_weight", 0), found.get("noising_bias", 0)
    table = {"uniform": "uniform", "logit_normal": "sigmoid"}
    found.choose("timestep_distribution", "timestep_sampling", "uniform", table)
    if found.settings["timestep_sampling"] == "sigmoid" and (weight or bias):
        found.refuse("noising_weight, noising_bias", f"{weight:g} and {bias:g} (only 0 and 0)")
    found.same("timestep_shift", training_shift=float(found.get("timestep_shift", 1.0)))


def _memory(found: Translation) -> None:
    found.choose("transformer.weight_dtype", "quantize", "float_32", _QUANTIZATIONS)
    precision(found, "train_dtype", "FLOAT_16")
    old = found.keys.get("gradient_checkpointing")
    on = old not in ("OFF", False) and found.get("transformer.gradient_checkpointing", True)
    found.same(
        "transformer.gradient_checkpointing, gradient_checkpointing",
        gradient_checkpointing=bool(on),
    )
    key = "transformer.offload_fraction"
    if (fraction := found.get(key, 0)) and old in (None, "CPU_OFFLOADED"):
        found.differs(key, f"{fraction:g}", low_memory=True)


def _dataset(found: Translation) -> None:
    found.same("concepts.path", dataset=str(found.keys.get("concepts.path", "")))
    found.same("resolution", resolution=str(edges(found.get("resolution", "512"))))
    subfolders = found.get("concepts.include_subdirectories", False)
    text = "" if subfolders else "images in subfolders are used here, too"
    found.same("concepts.include_subdirectories", text)
    if found.get("concepts.image.enable_crop_jitter", True):
        text = "three crops: at the center and at both ends; there, one by chance"
        found.differs("concepts.image.enable_crop_jitter", text, crop_jitter=1.0)
    if found.get("concepts.image.enable_random_flip"):
        text = "each image and its mirror image; there, by chance one of them"
        found.differs("concepts.image.enable_random_flip", text, horizontal_flip=True)
    bucketing(found, "aspect_ratio_bucketing", True, "squares")
    found.same("batch_size", batch_size=found.get("batch_size", 1))
    dropout = found.get("text_encoder.dropout_probability", 0.0)
    found.same("text_encoder.dropout_probability", caption_dropout=float(dropout))


def _steps(found: Translation) -> None:
    batch = found.settings["batch_size"]
    every, epochs = found.settings["gradient_accumulation"], found.get("epochs", 100)
    count(found, "steps", ("", None), ("epochs", epochs))
    for key, setting in (("save_every", "checkpoint_every"), ("sample_after", "sample_every")):
        unit = str(found.get(f"{key}_unit", "NEVER"))
        if found.get(key) and unit in ("STEP", "EPOCH"):
            keys = ("", None), (key, None)
            count(found, setting, *(keys if unit == "EPOCH" else keys[::-1]))
            found.same(f"{key}_unit", unit)
        else:
            found.no_effect(f"{key}, {key}_unit", "not in steps or epochs")
    warmup = found.get("learning_rate_warmup_steps", 200)
    if 0 < warmup <= 1:
        found.settings["epochs"]["lr_warmup_steps"] = warmup * epochs
        found.same("learning_rate_warmup_steps", f"{warmup:g} of the steps")
    else:
        found.same("learning_rate_warmup_steps", lr_warmup_steps=int(warmup / every))
    strategy = found.get("concepts.balancing_strategy", "REPEATS")
    passes = found.get("concepts.balancing", 1)
    if strategy == "REPEATS":
        found.same("concepts.balancing_strategy", strategy)
    else:
        found.refuse("concepts.balancing_strategy", f"{strategy} (only REPEATS is supported)")
    found.same("concepts.balancing", f"an epoch is {passes:g} passes")
    # Of several resolutions, each image has one in each pass.
    resolutions = len(str(found.settings["resolution"]).split(","))
    epoch(found, passes / resolutions, batch, every, drop_last=True)


def _samples(found: Translation) -> None:
    samples = found.keys.get("samples")
    if not isinstance(samples, list):
        return
    used = [each for each in samples if isinstance(each, dict) and each.get("enabled", True)]
    prompts = tuple(str(each["prompt"]) for each in used if each.get("prompt"))
    text = "sample_prompts, without their size, seed and other options"
    found.differs("samples", f"{len(prompts)} {text}", sample_prompts=prompts)


def _captions(found: Translation) -> None:
    source = found.get("concepts.text.prompt_source", "sample")
    if source == "sample":
        found.same("concepts.text.prompt_source", "sample: NAME.txt")
    else:
        found.refuse("concepts.text.prompt_source", f"{source} (write captions into NAME.txt)")


PROGRAM = Program(
    name="OneTrainer",
    source="23df3832 (2026-08-19)",
    is_job=_is_job,
    keys_of=_keys,
    defaults={},
    settings={},
    rules=(_base, _layers, _learning, _timesteps, _memory, _dataset, _captions, _steps, _samples),
    only={
        "training_method": ("LORA",),
        "transformer.train": (True,),
        "transformer.stop_training_after_unit": ("NEVER",),
        "transformer.guidance_scale": (1,),
        "text_encoder.train": (False,),
        "concepts.loss_weight": (1,),
        "concepts.type": ("STANDARD",),
        "concepts.enabled": (True,),
        "mse_strength": (1,),
        "loss_weight_fn": ("CONSTANT",),
        "loss_scaler": ("NONE",),
        "learning_rate_scaler": ("NONE",),
        "learning_rate_cycles": (1,),
        "max_noising_strength": (1,),
        "text_encoder_sequence_length": (512, None),
        "optimizer.beta1": (0.9, None),
        "optimizer.beta2": (0.999, None),
        "optimizer.eps": (1e-8, 1e-30, None),
        "optimizer.eps2": (1e-3, None),
        "optimizer.d_coef": (1, None),
        "optimizer.d0": (1e-6, None),
        "optimizer.clip_threshold": (1, None),
        "optimizer.decay_rate": (-0.8, None),
    },
    no_effect=(
        *("__version", "debug_*", "workspace_dir", "cache_dir", "huggingface_*", "offline_mode"),
        *("tensorboard*", "validat*", "continue_last_backup", "prevent_overwrites"),
        *("multi_gpu", "device_indexes", "gradient_reduce_*", "fused_gradient_*", "async_*"),
        *("output_*", "weight_dtype", "compile", "concept_file_name", "latent_caching"),
        *("clear_cache_*", "ema_*", "dataloader_threads", "train_device", "temp_device"),
        *("fallback_train_dtype", "enable_autocast_cache", "frames", "attention_mechanism"),
        *("huber_delta", "vb_loss_strength", "loss_weight_strength", "unmasked_*"),
        *("unet.*", "prior.*", "unconditional_transformer.*", "text_encoder.*", "text_encoder_*"),
        *("vae.*", "effnet_encoder.*", "decoder*", "quantization.*", "embedding*"),
        *("transformer.include", "transformer.train_embedding", "transformer.attention_mask"),
        *("transformer.activation_offloading", "concepts.text.tag_delimiter"),
        *("lora_decompose_norm_epsilon", "lora_weight_dtype", "bundle_*", "oft_*", "lokr_*"),
        *("optimizer_defaults*", "optimizer.stochastic_rounding", "cloud*"),
        *("optimizer.split_groups*", "optimizer.factored*", "optimizer.fused"),
        *("optimizer.use_stableadamw", "optimizer.use_schedulefree", "optimizer.rms_rescaling"),
        *("optimizer.weight_decay_by_lr", "optimizer.d_limiter"),
        *("optimizer.optim_bits", "optimizer.min_8bit_size", "optimizer.percentile_clipping"),
        *("optimizer.block_wise", "optimizer.decouple", "optimizer.slice_p", "optimizer.*_mode"),
        *("optimizer.growth_rate", "optimizer.orthogonal_gradient", "optimizer.state_precision"),
        *("sample_*", "samples_to_tensorboard", "non_ema_sampling", "backup_*", "rolling_backup*"),
        *("save_skip_first", "save_filename_prefix", "secrets*", "concepts.name", "concepts.seed"),
        *("concepts.image_variations", "concepts.text_variations", "concepts.concept_stats*"),
        *("concepts.image.resolution_override", "concepts.image.*_max_*", "concepts.text.*_mode"),
        *("include_train*", "concepts.text.keep_tags_count", "enable_activation_offloading"),
    ),
)
