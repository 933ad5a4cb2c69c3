"""The Cog face of training: a dataset in, `weights.zip` out.

Cog reads the inputs below at build time without running this file: every default, bound and
description is a literal, on purpose. All behaviour is in `trainer`.
"""

from typing import Optional

from cog import BaseModel, Input, Path, Secret

from serving.inputs import logged, metric, plain, served

BASE_MODELS = [
    "auto",
    "qwen-image",
    "qwen-image-2512",
    "z-image-turbo",
    "z-image",
    "z-image-de-turbo",
    "miniature-turbo",
    "miniature",
]

if served():
    # Imported before the first request: a cancellation could interrupt an import halfway.
    import trainer.run  # noqa: F401


class TrainingOutput(BaseModel):
    weights: Path


# fmt: off
def train(
    dataset: Path = Input(description="Zip or tar of 10 to 40 pictures (jpg, png, webp), with an optional caption in NAME.txt beside each NAME.jpg.", accept=".zip,.tar,application/zip,application/x-tar", max_length=104857600),
    base_model: str = Input(description="Model to train on. auto takes $BASE_MODEL, else the largest that fits the GPU, and the included miniature without a GPU.", default="auto", choices=BASE_MODELS),
    default_caption: str = Input(description="Caption of pictures that have none of their own. TOK stands for your subject.", default="a photo of TOK", max_length=10000),
    skip_bad_images: bool = Input(description="Leave out pictures that are broken or of no use, and say which. Off: refuse the dataset and name them all.", default=False),
    train_placeholder_token: bool = Input(description="Teach a new word without any prior meaning for your subject. Off: train the LoRA alone, with the captions as written.", default=True),
    placeholder_token: str = Input(description="The new word, to be used in prompts later.", default="<zwx>", max_length=64),
    placeholder_init_std: float = Input(description="Standard deviation of the new word's embedding before training. 0 starts from exact zeros.", default=1e-5, ge=0, le=1),
    turbo_adapter: str = Input(description="Adapter that keeps turbo models fast: merged while training, gone when drawing. auto: the one made for the model.", default="auto", choices=["auto", "v1", "v2", "none"]),
    preset: Optional[str] = Input(description="What the pictures are for: sets what is left empty below. quick_test: a fifth of the steps. Empty: the model's own settings.", default=None, choices=["quick_test", "character", "style", "concept"]),
    rank: Optional[int] = Input(description="LoRA rank: higher remembers more detail and makes a larger file. Empty: what suits the model.", default=None, ge=1, le=256),
    lora_targets: str = Input(description="Layers that the LoRA adapts: auto (attention and feed-forward), attention, feed_forward, all, or names and patterns of layers with commas.", default="auto", max_length=1000),
    steps: Optional[int] = Input(description="Optimiser steps. Empty: what suits the model and the number of pictures.", default=None, ge=1, le=20000),
    learning_rate: Optional[float] = Input(description="Learning rate of the LoRA. Empty: what suits the model.", default=None, ge=0, le=1),
    placeholder_learning_rate: Optional[float] = Input(description="Learning rate of the new word. Empty: what suits the model.", default=None, ge=0, le=1),
    optimizer: str = Input(description="prodigy finds the LoRA's learning rate by itself; adamw8bit is for a GPU.", default="adamw", choices=["adamw", "adamw8bit", "prodigy", "adafactor"]),
    lr_scheduler: Optional[str] = Input(description="How the learning rate goes on after its warm-up. Empty: what suits the model.", default=None, choices=["constant", "linear", "cosine"]),
    lr_warmup_steps: Optional[int] = Input(description="Steps over which the learning rate rises. Empty: a tenth of the steps, at most 20.", default=None, ge=0, le=20000),
    batch_size: Optional[int] = Input(description="Pictures per step. Empty: what suits the model.", default=None, ge=1, le=64),
    gradient_accumulation: int = Input(description="Batches per step: as a larger batch, in the memory of a small one.", default=1, ge=1, le=1000),
    resolution: Optional[str] = Input(description="Edge length in pixels the pictures are trained at, or several with commas (512,768,1024). Empty: what suits the model.", default=None, max_length=64),
    timestep_sampling: Optional[str] = Input(description="How noise levels are drawn. sigmoid and logit_normal: mostly middle ones; uniform: all alike; shift: as the model meets them when it draws. Empty: what suits the model.", default=None, choices=["uniform", "logit_normal", "sigmoid", "shift"]),
    caption_prefix: str = Input(description="Put before every caption, as written; end it with a space where one belongs. TOK stands for your subject.", default="", max_length=1000),
    caption_suffix: str = Input(description="Put after every caption, as written.", default="", max_length=1000),
    caption_dropout: Optional[float] = Input(description="Share of the pictures that are shown with an empty caption. Empty: what suits the model.", default=None, ge=0, le=1),
    ema_decay: Optional[float] = Input(description="Ship a running average of the weights with this decay, such as 0.99. 0 ships the last ones. Empty: what suits the preset.", default=None, ge=0, le=0.99999),
    quantize: str = Input(description="Type of the frozen model's weights, to save memory. auto: chosen by the free memory.", default="auto", choices=["auto", "none", "fp8", "int8", "nf4"]),
    low_memory: Optional[bool] = Input(description="Move what is not in use to main memory: slower, for small cards. Empty: decided by the free memory.", default=None),
    sample_prompts: Optional[str] = Input(description="Prompts for preview images, one per line. Default: a caption and one other prompt, before, halfway and at the end; empty text: none. TOK is the subject. Options behind a prompt: --w --h --s (steps) --d (seed) --l (guidance) --n (negative prompt).", default=None, max_length=20000),
    sample_every: int = Input(description="Generate the preview images every so many steps. 0: only at the end.", default=0, ge=0, le=20000),
    validation_every: Optional[int] = Input(description="Measure the validation loss every so many steps. From 20 images on, one in ten (at most 8) is held out for it and not trained on. 0: never, nothing is held out. Empty: about ten times.", default=None, ge=0, le=20000),
    checkpoint_every: Optional[int] = Input(description="Write a checkpoint every so many steps, to resume from. 0: only at the end and when the run is stopped. Empty: ten times in a run, and at least every 10 minutes.", default=None, ge=0, le=20000),
    resume_from: Optional[Path] = Input(description="A checkpoint to go on from as if nothing had happened, or a weights.zip to continue with a fresh optimiser.", default=None, max_length=104857600),
    trackers: Optional[str] = Input(description="Where to follow the training, with commas: tensorboard, wandb, trackio.", default=None, max_length=64),
    wandb_api_key: Optional[Secret] = Input(description="Key of your Weights & Biases account.", default=None, max_length=1000),
    wandb_project: Optional[str] = Input(description="Project that the run belongs to, in wandb or trackio. Empty: zeroprior.", default=None, max_length=128),
    wandb_run: Optional[str] = Input(description="Name of the run, in wandb or trackio. Empty: drawn by it.", default=None, max_length=128),
    wandb_entity: Optional[str] = Input(description="Weights & Biases user or team that the run belongs to. Empty: the key's own.", default=None, max_length=128),
    hf_repo_id: Optional[str] = Input(description="OWNER/NAME of a Hugging Face repository that the result is uploaded to, with a model card.", default=None, max_length=128),
    hf_token: Optional[Secret] = Input(description="Hugging Face token with write access, for hf_repo_id.", default=None, max_length=1000),
    seed: Optional[int] = Input(description="The same seed and inputs give the same weights. Empty: drawn at random and written into meta.json.", default=None, ge=0),
) -> TrainingOutput:
    """Train a LoRA, and with it a new word for the subject, from a zip of pictures."""
    inputs = plain(locals())
    with logged(inputs):
        from trainer.run import train_from_inputs

        return TrainingOutput(weights=Path(train_from_inputs(metric, served=served(), **inputs)))
# fmt: on
