"""The Cog interface of training: a dataset in, `weights.zip` out.

Cog reads the inputs below at build time without running this file, so every default, bound and
description is a literal. A test compares them with `trainer.settings.inputs`.
"""

from typing import Optional

from cog import BaseModel, Input, Path, Secret

from serving.inputs import entry_point, metric, served

BASE_MODELS = [
    "auto",
    "qwen-image",
    "qwen-image-2512",
    "qwen-image-edit-2511",
    "qwen-image-edit-2509",
    "qwen-image-2.1",
    "qwen-image-2.1-turbo",
    "z-image-turbo",
    "z-image",
    "z-image-de-turbo",
    "miniature-turbo",
    "miniature",
    "miniature-qwen",
]

if served():
    # Imported before the first request: a cancellation could interrupt an import halfway.
    import trainer.run  # noqa: F401


class TrainingOutput(BaseModel):
    weights: Path


# fmt: off
@entry_point
def train(
    dataset: Path = Input(description="Zip or tar of 10 to 40 images (JPEG, PNG, WebP, HEIC and others), with an optional caption in NAME.txt next to each NAME.jpg.", accept=".zip,.tar,application/zip,application/x-tar", max_length=104857600),
    name: Optional[str] = Input(description="Name of the run, in the name of its folder: outputs/DATE-NAME-01. Default: the dataset's name.", default=None, max_length=64),
    base_model: str = Input(description="Model to train on. auto: $BASE_MODEL, else the largest that fits the GPU, and the included miniature test model without a GPU.", default="auto", choices=BASE_MODELS),
    default_caption: str = Input(description="Caption of images that have none of their own. TOK stands for your subject.", default="a photo of TOK", max_length=10000),
    skip_bad_images: bool = Input(description="Skip images that cannot be used, with a warning that names them. Off: refuse the dataset and name them all.", default=False),
    train_placeholder_token: bool = Input(description="Train a placeholder token for the subject. It carries no meaning from pre-training. Off: LoRA only, and trigger_word stands for the subject.", default=True),
    placeholder_token: str = Input(description="The token, to be used in prompts later.", default="<zwx>", max_length=64),
    subjects: Optional[str] = Input(description="Several subjects in one LoRA: their tokens with commas, <zwx>,<kul>. TOKEN=FOLDER names the folder of its images in the dataset; default: one with the token's name. Other captions must contain the tokens.", default=None, max_length=1000),
    placeholder_init_std: float = Input(description="Standard deviation of the token's embedding before training. 0 starts from exact zeros.", default=1e-5, ge=0, le=1),
    trigger_word: Optional[str] = Input(description="Only without a placeholder token: ordinary text that replaces TOK in captions, and is put before captions that do not contain it.", default=None, max_length=1000),
    turbo_adapter: str = Input(description="Training adapter: merged during training, not used at inference, so that a distilled model stays fast. auto: the one made for the model.", default="auto", choices=["auto", "v1", "v2", "v3", "none"]),
    preset: Optional[str] = Input(description="What the images are for: other defaults for the settings below. quick_test: a fifth of the steps. Default: the model's own settings.", default=None, choices=["quick_test", "character", "style", "concept"]),
    rank: Optional[int] = Input(description="LoRA rank: higher learns more detail and makes a larger file. Default: depends on the model.", default=None, ge=1, le=256),
    lora_targets: str = Input(description="Layers that the LoRA adapts: auto (attention and feed-forward), attention, feed_forward, all, or names and patterns of layers with commas.", default="auto", max_length=1000),
    steps: Optional[int] = Input(description="Optimizer steps. Default: depends on the model and the number of images.", default=None, ge=1, le=100000),
    learning_rate: Optional[float] = Input(description="Learning rate of the LoRA. Default: depends on the model.", default=None, ge=0, le=1),
    placeholder_learning_rate: Optional[float] = Input(description="Learning rate of the token's embedding. Default: depends on the model.", default=None, ge=0, le=1),
    optimizer: str = Input(description="prodigy finds the LoRA's learning rate by itself; adamw8bit is for a GPU.", default="adamw", choices=["adamw", "adamw8bit", "prodigy", "adafactor"]),
    lr_scheduler: Optional[str] = Input(description="Learning rate schedule after the warm-up. Default: depends on the model.", default=None, choices=["constant", "linear", "cosine"]),
    lr_warmup_steps: Optional[int] = Input(description="Steps over which the learning rate rises. Default: a tenth of the steps, at most 20.", default=None, ge=0, le=100000),
    batch_size: Optional[int] = Input(description="Images per batch. Default: depends on the model.", default=None, ge=1, le=256),
    gradient_accumulation: int = Input(description="Batches per step: like a larger batch, in the memory of a small one.", default=1, ge=1, le=1000),
    weight_decay: float = Input(description="Weight decay of the LoRA.", default=1e-4, ge=0, le=1),
    max_grad_norm: float = Input(description="Gradients are clipped to this norm, those of the LoRA and of the token separately.", default=1.0, ge=1e-6, le=1e6),
    masks: Optional[str] = Input(description="Train on the white part of each image's mask; what is black has a tenth of its usual weight. auto: if every image has a mask file; alpha: transparency is the mask. Default: auto; off with the preset style.", default=None, choices=["auto", "alpha", "off"]),
    horizontal_flip: bool = Input(description="Train on each image and its mirror image. Not for text, faces and subjects whose sides differ.", default=False),
    resolution: Optional[str] = Input(description="Edge length in pixels of the training images, or several with commas (512,768,1024). Default: depends on the model.", default=None, max_length=64),
    timestep_sampling: Optional[str] = Input(description="Timestep sampling. sigmoid, logit_normal: mostly middle timesteps. uniform: all equally. shift: the inference schedule. Default: depends on the model.", default=None, choices=["uniform", "logit_normal", "sigmoid", "shift"]),
    training_shift: Optional[float] = Input(description="Shifts the sampled timesteps towards noise where it is above 1; not with timestep_sampling shift. Default: depends on the model.", default=None, ge=0.1, le=20),
    autocaption: Optional[str] = Input(description="Before training, write captions for images that have none, with a vision-language model. subject: of everything except the subject; style: of everything except the style. Default: off.", default=None, choices=["subject", "style"]),
    caption_prefix: str = Input(description="Put before every caption, as written; end it with a space where one belongs. TOK stands for your subject.", default="", max_length=1000),
    caption_suffix: str = Input(description="Put after every caption, as written.", default="", max_length=1000),
    caption_dropout: Optional[float] = Input(description="Share of samples that see an empty caption. Default: depends on the model.", default=None, ge=0, le=1),
    ema_decay: Optional[float] = Input(description="Save EMA weights with this decay, such as 0.99. 0: no EMA. Default: depends on the preset.", default=None, ge=0, le=0.99999),
    preserve: str = Input(description="Weight of the rows that keep images of other prompts as the base model makes them: auto, off or a number. auto: by the model; off without a token and trigger word, except for pairs.", default="auto", max_length=32),
    preserve_prompts: Optional[str] = Input(description="Prompts for preserve, one per line: various ones without the subject, and of the subject (TOK) in new places; for pairs, other instructions. Default: those that come with the model.", default=None, max_length=100000),
    quantize: str = Input(description="Quantization of the frozen base model, to save memory. auto: chosen by the free memory.", default="auto", choices=["auto", "none", "fp8", "int8", "nf4"]),
    gradient_checkpointing: Optional[bool] = Input(description="Recompute activations: slower, in less memory. Default: chosen by the free memory.", default=None),
    low_memory: Optional[bool] = Input(description="Offload weights to CPU memory. Slower; for small GPUs. Default: chosen by the free memory.", default=None),
    sample_prompts: Optional[str] = Input(description="Prompts for preview images, one per line. Default: a caption and one other prompt, before, halfway and at the end; empty text: none. TOK is the subject. Options behind a prompt: --w --h --s (steps) --d (seed) --l (guidance) --n (negative prompt).", default=None, max_length=20000),
    sample_every: int = Input(description="Generate the preview images every so many steps. 0: only at the end.", default=0, ge=0, le=100000),
    validation_every: Optional[int] = Input(description="Measure the loss on fixed noise every so many steps, on held-out images if there are any. 0: never, nothing is held out. Default: about ten times.", default=None, ge=0, le=100000),
    validation_images: str = Input(description="Images that are held out to measure the validation loss, and not trained on: auto or a number. auto: from 20 images on, one in ten (at most 8).", default="auto", max_length=16),
    keep_best: bool = Input(description="Save the weights with the lowest validation loss instead of the last ones. Needs held-out images.", default=False),
    early_stopping: bool = Input(description="End the run if the validation loss has not reached a new minimum for 30 % of the steps. Needs held-out images.", default=False),
    checkpoint_every: Optional[int] = Input(description="Write a checkpoint every so many steps, to resume from. 0: only at the end and when the run is stopped. Default: ten times in a run, and at least every 10 minutes.", default=None, ge=0, le=100000),
    resume_from: Optional[Path] = Input(description="A checkpoint to resume from, or a weights.zip to train further with a fresh optimizer.", default=None, max_length=104857600),
    trackers: Optional[str] = Input(description="Where to follow the run, with commas: tensorboard, wandb, trackio.", default=None, max_length=64),
    wandb_api_key: Optional[Secret] = Input(description="Key of your Weights & Biases account.", default=None, max_length=1000),
    wandb_project: Optional[str] = Input(description="Project of the run, in wandb or trackio. Default: zeroprior.", default=None, max_length=128),
    wandb_run: Optional[str] = Input(description="Name of the run, in wandb or trackio. Default: chosen by the tracker.", default=None, max_length=128),
    wandb_entity: Optional[str] = Input(description="Weights & Biases user or team of the run. Default: the key's own.", default=None, max_length=128),
    hf_repo_id: Optional[str] = Input(description="OWNER/NAME of a Hugging Face repository that the result is uploaded to, with a model card.", default=None, max_length=128),
    hf_token: Optional[Secret] = Input(description="Hugging Face token with write access, for hf_repo_id.", default=None, max_length=1000),
    seed: Optional[int] = Input(description="The same seed and inputs give the same weights. Default: random, and written to meta.json.", default=None, ge=0),
) -> TrainingOutput:
    """Train a LoRA and a placeholder token for the subject from a zip of images."""
    from trainer.run import train_from_inputs
    from trainer.settings import TrainingInputs

    inputs = TrainingInputs(
        dataset=dataset,
        name=name,
        base_model=base_model,
        default_caption=default_caption,
        skip_bad_images=skip_bad_images,
        train_placeholder_token=train_placeholder_token,
        placeholder_token=placeholder_token,
        subjects=subjects,
        placeholder_init_std=placeholder_init_std,
        trigger_word=trigger_word,
        turbo_adapter=turbo_adapter,
        preset=preset,
        rank=rank,
        lora_targets=lora_targets,
        steps=steps,
        learning_rate=learning_rate,
        placeholder_learning_rate=placeholder_learning_rate,
        optimizer=optimizer,
        lr_scheduler=lr_scheduler,
        lr_warmup_steps=lr_warmup_steps,
        batch_size=batch_size,
        gradient_accumulation=gradient_accumulation,
        weight_decay=weight_decay,
        max_grad_norm=max_grad_norm,
        masks=masks,
        horizontal_flip=horizontal_flip,
        resolution=resolution,
        timestep_sampling=timestep_sampling,
        training_shift=training_shift,
        autocaption=autocaption,
        caption_prefix=caption_prefix,
        caption_suffix=caption_suffix,
        caption_dropout=caption_dropout,
        ema_decay=ema_decay,
        preserve=preserve,
        preserve_prompts=preserve_prompts,
        quantize=quantize,
        gradient_checkpointing=gradient_checkpointing,
        low_memory=low_memory,
        sample_prompts=sample_prompts,
        sample_every=sample_every,
        validation_every=validation_every,
        validation_images=validation_images,
        keep_best=keep_best,
        early_stopping=early_stopping,
        checkpoint_every=checkpoint_every,
        resume_from=resume_from,
        trackers=trackers,
        wandb_project=wandb_project,
        wandb_run=wandb_run,
        wandb_entity=wandb_entity,
        hf_repo_id=hf_repo_id,
        seed=seed,
    )
    weights = train_from_inputs(
        inputs,
        metric,
        served=served(),
        wandb_api_key=wandb_api_key,
        hf_token=hf_token,
    )
    return TrainingOutput(weights=Path(weights))
# fmt: on
