"""The keys of ai-toolkit's job files for Qwen-Image and Z-Image, and what each is here.

A key is written with the sections it lies in: `train.lr`. Of the list of datasets it is the one
dataset. Facts are those of ai-toolkit's example jobs and of its settings' defaults.
"""

from typing import Any

TRAINERS = ("sd_trainer", "diffusion_trainer", "ui_trainer")
ARCHITECTURES = {"zimage": "z_image", "qwen_image": "qwen_image"}  # theirs: our family

# What a file leaves out: their default where ours differs. Weight decay is the optimiser's own.
DEFAULTS: dict[str, Any] = {
    "rank": 4,
    "resolution": 512,
    "batch_size": 1,
    "steps": 1000,
    "default_caption": "",
    "trigger_word": "",
    "caption_dropout": 0.0,
    "lr_warmup_steps": 0,
    "timestep_sampling": "sigmoid",
    "training_shift": 1.0,
    "quantize": "none",
}
WEIGHT_DECAY = {"prodigy": 0.0, "adafactor": 0.0}  # of the others 0.01, as torch has it

# Keys with another name here, and the same meaning.
SETTING = {
    "trigger_word": "trigger_word",
    "network.linear": "rank",
    "network.rank": "rank",
    "save.save_every": "checkpoint_every",
    "save.hf_repo_id": "hf_repo_id",
    "datasets.folder_path": "dataset",
    "datasets.dataset_path": "dataset",
    "datasets.default_caption": "default_caption",
    "datasets.caption_dropout_rate": "caption_dropout",
    "datasets.resolution": "resolution",
    "train.batch_size": "batch_size",
    "train.steps": "steps",
    "train.gradient_accumulation": "gradient_accumulation",
    "train.gradient_checkpointing": "gradient_checkpointing",
    "train.lr": "learning_rate",
    "train.unet_lr": "learning_rate",
    "train.max_grad_norm": "max_grad_norm",
    "train.optimizer_params.weight_decay": "weight_decay",
    "sample.sample_every": "sample_every",
    "logging.project_name": "wandb_project",
    "logging.run_name": "wandb_run",
}
SAMPLE = {  # fields of a drawing request
    "sample.width": "width",
    "sample.height": "height",
    "sample.neg": "negative_prompt",
    "sample.seed": "seed",
    "sample.guidance_scale": "guidance_scale",
    "sample.sample_steps": "num_inference_steps",
    "sample.network_multiplier": "lora_scale",
}

# Keys of which we have one value alone, which is what we do anyway.
ONLY: dict[str, tuple[Any, ...]] = {
    "type": TRAINERS,
    "network.type": ("lora",),
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
    "train.max_denoising_steps": (1000,),
    "train.gradient_accumulation_steps": (1,),
    "train.noise_multiplier": (1,),
    "train.img_multiplier": (1,),
    "train.dtype": ("bf16", "bfloat16"),
    "model.dtype": ("bf16", "bfloat16"),
    "sample.sampler": ("flowmatch",),
    "sample.num_frames": (1,),
    "datasets.num_frames": (1,),
}

# Keys that change no weight: of caches, of other models, of their interface; or of what is done
# here by itself.
NO_EFFECT = {
    *("device", "performance_log_every", "sqlite_db_path"),
    *("network.linear_alpha", "network.alpha"),  # they set alpha to the rank for these models
    *("network.conv", "network.conv_alpha", "network.lokr_full_rank", "network.lokr_factor"),
    *("save.dtype", "save.max_step_saves_to_keep", "save.save_format", "save.push_to_hub"),
    *("save.hf_private",),
    *("datasets.cache_latents", "datasets.cache_latents_to_disk", "datasets.num_repeats"),
    *("datasets.bucket_tolerance", "datasets.type", "datasets.keep_tokens", "datasets.scale"),
    *("datasets.fps", "datasets.shrink_video_to_frames", "datasets.num_workers"),
    *("datasets.mask_min_value", "datasets.prefetch_factor"),
    *("train.cache_text_embeddings", "train.unload_text_encoder", "train.skip_first_sample"),
    *("train.force_first_sample", "train.switch_boundary_every"),
    *("train.xformers", "train.sdp", "train.attention_backend", "train.text_encoder_lr"),
    *("train.embedding_lr", "train.adapter_lr", "train.bypass_guidance_embedding"),
    *("train.diff_output_preservation_multiplier", "train.diff_output_preservation_class"),
    *("train.blank_prompt_preservation_multiplier",),
    *("model.quantize_te", "model.qtype_te", "model.extras_name_or_path", "model.compile"),
    *("model.layer_offloading_transformer_percent",),
    *("model.layer_offloading_text_encoder_percent",),
    *("logging.log_every", "logging.verbose", "logging.use_ui_logger"),
    *("sample.format", "sample.ext", "sample.fps"),
}

TIMESTEPS = {  # theirs: ours, and how that differs
    "sigmoid": ("sigmoid", None),
    "linear": ("uniform", None),
    "weighted": ("uniform", "the same sigmas without their loss weights"),
    "shift": ("shifted", "the shift of the model's own drawing schedule"),
}
