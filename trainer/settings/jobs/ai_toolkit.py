"""Job files of ai-toolkit: a YAML file with `job` and `config`.

A key is written with its sections: `train.lr`. `datasets` is the only dataset of the list.
Source: `toolkit/config_modules.py` for defaults, `toolkit/optimizer.py`, `toolkit/scheduler.py`,
and `ui/src/app/jobs/new` for jobs of its web UI. Keys that depend on each other are in
`ai_toolkit_rules`.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from trainer.settings.inputs import SettingsError
from trainer.settings.jobs import ai_toolkit_rules as rules
from trainer.settings.jobs.rules import only_dataset
from trainer.settings.jobs.translation import Program, Translation, flat, number

_TRAINERS = ("sd_trainer", "diffusion_trainer", "ui_trainer")

# Keys with the same meaning and another name here.
_SETTINGS = {
    "trigger_word": "trigger_word",
    "save.save_every": "checkpoint_every",
    "save.hf_repo_id": "hf_repo_id",
    "datasets.folder_path": "dataset",
    "datasets.dataset_path": "dataset",
    "datasets.default_caption": "default_caption",
    "datasets.caption_dropout_rate": "caption_dropout",
    "datasets.resolution": "resolution",
    "datasets.flip_x": "horizontal_flip",
    "model.model_kwargs.rgba": "keep_transparency",
    "train.batch_size": "batch_size",
    "train.steps": "steps",
    "train.gradient_accumulation": "gradient_accumulation",
    "train.gradient_checkpointing": "gradient_checkpointing",
    "sample.sample_every": "sample_every",
    "logging.project_name": "wandb_project",
    "logging.run_name": "wandb_run",
}
_SAMPLE = {  # fields of a generation request
    "sample.width": "width",
    "sample.height": "height",
    "sample.neg": "negative_prompt",
    "sample.seed": "seed",
    "sample.sample_steps": "num_inference_steps",
    "sample.network_multiplier": "lora_scale",
}

# Keys with only one supported value, which is always used here.
_ONLY: dict[str, tuple[Any, ...]] = {
    "job": ("extension",),
    "type": _TRAINERS,
    "network.transformer_only": (True,),
    "datasets.caption_ext": ("txt", ".txt"),
    "datasets.buckets": (True,),
    "datasets.network_weight": (1,),
    "datasets.loss_multiplier": (1,),
    "train.train_unet": (True,),
    "train.train_text_encoder": (False,),
    "train.noise_scheduler": ("flowmatch",),
    "train.loss_type": ("mse",),
    "train.loss_target": ("noise",),
    "train.content_or_style": ("balanced",),
    "train.num_train_timesteps": (1000,),
    "train.max_denoising_steps": (999, 1000),  # all timesteps; 999 is their default
    # The optimizers' defaults, in both programs.
    "train.optimizer_params.d_coef": (1,),
    "train.optimizer_params.d0": (1e-6,),
    "train.optimizer_params.betas": ([0.9, 0.999],),
    "train.optimizer_params.eps": (1e-8,),
    "train.optimizer_params.decouple": (True,),
    "train.noise_multiplier": (1,),
    "train.img_multiplier": (1,),
    "model.dtype": ("bf16", "bfloat16"),
    "sample.sampler": ("flowmatch",),
    "sample.num_frames": (1,),
    "datasets.num_frames": (1,),
}

# Keys without effect on the weights: caches, other models, their user interface, or automatic here.
_NO_EFFECT = {
    *("meta.*", "device", "performance_log_every", "sqlite_db_path"),
    *("train.validation_config", "sample.sample_start_step", "datasets.cache_tensors_to_disk"),
    *("datasets.cache_latents_num_workers", "datasets.cache_text_embeddings"),
    *("model.block_compile", "model.compile_mode", "model.compile_fullgraph"),
    *("model.compile_dynamic", "model.cache_size_limit"),
    *("network.linear_alpha", "network.alpha"),  # they set alpha to the rank for these models
    *("network.conv", "network.conv_alpha"),
    *("save.dtype", "save.max_step_saves_to_keep", "save.save_format", "save.push_to_hub"),
    *("save.hf_private",),
    *("datasets.cache_latents", "datasets.cache_latents_to_disk", "datasets.num_repeats"),
    *("datasets.bucket_tolerance", "datasets.type", "datasets.keep_tokens", "datasets.scale"),
    *("datasets.num_workers", "datasets.prefetch_factor"),
    *("train.cache_text_embeddings", "train.unload_text_encoder", "train.skip_first_sample"),
    *("train.force_first_sample", "train.switch_boundary_every"),
    *("train.xformers", "train.sdp", "train.attention_backend", "train.text_encoder_lr"),
    *("train.embedding_lr", "train.adapter_lr", "train.bypass_guidance_embedding"),
    *("model.quantize_te", "model.qtype_te", "model.extras_name_or_path", "model.compile"),
    *("model.layer_offloading_transformer_percent",),
    *("model.layer_offloading_text_encoder_percent",),
    *("logging.log_every", "logging.verbose", "logging.use_ui_logger"),
    *("sample.format", "sample.ext", "sample.fps"),
}

# Keys without effect while another key is off. If that one is on, it is refused.
_SWITCHES = {
    "train.diff_output_preservation_multiplier": "train.diff_output_preservation",
    "train.diff_output_preservation_class": "train.diff_output_preservation",
    "train.blank_prompt_preservation_multiplier": "train.blank_prompt_preservation",
    "train.inverted_mask_prior_multiplier": "train.inverted_mask_prior",
    "train.differential_guidance_scale": "train.do_differential_guidance",
    "train.guidance_loss_target": "train.do_guidance_loss",
    "train.guidance_loss_schedule": "train.do_guidance_loss",
    "train.batch_noise_correction_scale": "train.do_batch_noise_correction",
    "train.signal_amplification_strength": "train.do_signal_amplification",
    "train.correct_pred_norm_multiplier": "train.correct_pred_norm",
    "train.target_norm_std_value": "train.target_norm_std",
    "train.paramiter_swapping_factor": "train.do_paramiter_swapping",
    "train.merge_network_on_save_strength": "train.merge_network_on_save",
    "datasets.random_triggers_max": "datasets.random_triggers",
}
# Keys for video, without effect if the datasets have one frame.
_VIDEO = {
    *("datasets.do_i2v", "datasets.do_audio", "datasets.audio_normalize", "datasets.fps"),
    *("datasets.audio_preserve_pitch", "datasets.shrink_video_to_frames"),
    *("datasets.auto_frame_count", "datasets.trim_auto_frame_count_tail"),
    *("train.audio_loss_multiplier",),
}


def _is_job(content: Any) -> bool:
    return isinstance(content, dict) and "job" in content and "config" in content


def _keys(content: Mapping[str, Any], path: Path) -> dict[str, Any]:
    """The keys of the job's only process, with its only dataset instead of the list."""
    config = content["config"]
    processes = config.get("process") if isinstance(config, dict) else None
    if not isinstance(processes, list) or not all(isinstance(each, dict) for each in processes):
        raise SettingsError("config.process must be a list of processes, as in ai-toolkit")
    if len(processes) != 1:
        raise SettingsError(
            f"config.process lists {len(processes)}; write each into a separate file"
        )
    process = dict(processes[0])
    datasets = process.get("datasets")
    every = datasets if isinstance(datasets, list) else ()
    if len(every) > 1 and any(isinstance(each, dict) and each.get("is_reg") for each in every):
        raise SettingsError(
            "datasets with is_reg are trained on in ai-toolkit; here their images can serve "
            "preserve: put them into a folder reg of the other dataset, remove this one, and give "
            "--preserve auto"
        )
    process["datasets"] = only_dataset(process.get("datasets"), "datasets")
    others = flat({key: value for key, value in content.items() if key != "config"})
    others |= flat({key: value for key, value in config.items() if key != "process"}, "config.")
    return {"config.name": "lora"} | others | flat(process)


def _video(found: Translation) -> None:
    if number(found.get("datasets.num_frames", 1)) == 1:
        for key in _VIDEO & found.keys.keys():
            found.no_effect(key, "for video; this dataset has one frame")


PROGRAM = Program(
    name="ai-toolkit",
    source="27a03a91 (2026-08-21)",
    is_job=_is_job,
    keys_of=_keys,
    defaults={"rank": 4, "resolution": 512, "batch_size": 1, "steps": 1000}
    | {"gradient_checkpointing": True},
    settings=_SETTINGS,
    sample=_SAMPLE,
    only=_ONLY,
    no_effect=_NO_EFFECT,
    switches=_SWITCHES,
    rules=(*rules.RULES, _video),
)
