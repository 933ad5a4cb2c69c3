"""The inputs of a training run, one per line as in train.py."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, ClassVar

from pydantic import BeforeValidator, ValidationInfo, field_validator

from adapters.forms import FACTOR, TITLES
from adapters.placeholder_token import MAX_LENGTH
from families.redact import looks_like_address, safe_name
from families.tokens import check_unicode
from inference.input_fields import Input, Inputs, Interface
from trainer.settings.choices import (
    LR_SCHEDULERS,
    MASKS,
    MAX_STEPS,
    OPTIMIZERS,
    QUANTIZATIONS,
    REGULARIZATIONS,
    TIMESTEP_SAMPLINGS,
    TRACKERS,
    TRAININGS,
)
from trainer.settings.names import fault_of_name
from trainer.settings.presets import PRESETS

DATA, MODEL, OPTIMIZATION, MEMORY, OUTPUT, TRACKING = GROUPS = (
    "data",
    "model",
    "optimization",
    "memory",
    "output",
    "tracking",
)
NAMES = ("name", "wandb_project", "wandb_run", "wandb_entity")  # become part of a path


class SettingsError(ValueError):
    """A setting that is invalid or conflicts with another."""


def _file(value: Any, info: ValidationInfo) -> Any:
    """A path; an empty one is None. The error for a URL does not show its query, maybe a key."""
    if not isinstance(value, str | os.PathLike):
        return value
    name, text = str(info.field_name), str(value)
    check_unicode(name, text)
    if "\0" in text:
        raise ValueError(f"{name} {text[:200]!r} contains a NUL character; correct the path")
    if looks_like_address(text) and not os.path.lexists(text):
        raise ValueError(
            f"{name} {safe_name(text)[:200]} does not exist; URLs are not supported here: "
            "download the file first"
        )
    try:
        return Path(text).expanduser() if text else None
    except RuntimeError as error:
        user = text.partition("/")[0]
        raise ValueError(f"{name} {text[:200]}: there is no user {user[1:]}") from error


File = Annotated[Path, BeforeValidator(_file)]
OptionalFile = Annotated[Path | None, BeforeValidator(_file)]  # empty text is None


# fmt: off
class TrainingInputs(Inputs):
    """The inputs of a training run. None: the default of preset, base model or number of images.

    `trainer.settings.fields.resolve` sets defaults. Raises `SettingsError` listing all errors.
    """

    refusal: ClassVar[type[ValueError]] = SettingsError

    # Data.
    dataset: Annotated[File, Input("Zip or tar of 10 to 40 images (JPEG, PNG, WebP, HEIC and others), with an optional caption in NAME.txt next to each NAME.jpg.", DATA, section="", hint="give a zip or tar of images")]
    controls: Annotated[str | Sequence[str] | None, Input("Of editing models: folders with the images before the edit, under the names of the dataset's images, with commas. Default: those in the dataset (control, control_2).", DATA, max_length=4_000, separator=",", one="folder", on=Interface.LOCAL, section="")] = None
    default_caption: Annotated[str, Input("Caption of images that have none of their own. TOK stands for your subject.", DATA, max_length=10_000)] = "a photo of TOK"
    autocaption: Annotated[str | None, Input("Before training, write captions for images that have none, with a vision-language model. subject: of everything except the subject; style: of everything except the style. Default: off.", DATA, choices=("subject", "style"))] = None
    caption_prefix: Annotated[str, Input("Put before every caption, as written; end it with a space where one belongs. TOK stands for your subject.", DATA, max_length=1_000)] = ""
    caption_suffix: Annotated[str, Input("Put after every caption, as written.", DATA, max_length=1_000)] = ""
    caption_dropout: Annotated[float | None, Input("Share of samples that see an empty caption. Default: depends on the model.", DATA, ge=0, le=1)] = None
    trigger_word: Annotated[str | None, Input("Only without a placeholder token: ordinary text that replaces TOK in captions, and is put before captions that do not contain it.", DATA, max_length=1_000)] = None
    skip_bad_images: Annotated[bool, Input("Skip images that cannot be used, with a warning that names them. Off: refuse the dataset and name them all.", DATA)] = False
    masks: Annotated[str | None, Input("Train on the white part of each image's mask; what is black has a tenth of its usual weight. auto: if every image has a mask file; alpha: transparency is the mask. Default: auto; off with the preset style.", DATA, choices=MASKS)] = None
    keep_transparency: Annotated[bool, Input("Train on the transparency of images, for a base model that generates an alpha channel (Qwen-Image-2.1). Off: it becomes white.", DATA, on=Interface.LOCAL)] = False
    horizontal_flip: Annotated[bool, Input("Train on each image and its mirror image. Not for text, faces and subjects whose sides differ.", DATA)] = False
    crop_jitter: Annotated[float, Input("Train on three crops of images that do not fit their bucket: at the center and shifted to both ends, by this share of what is cut off. 1: to the ends.", DATA, ge=0, le=1, on=Interface.LOCAL)] = 0.0
    resolution: Annotated[int | str | Sequence[int | str] | None, Input("Edge length in pixels of the training images, or several with commas (512,768,1024). Default: depends on the model.", DATA, max_length=64, separator=",", unit="pixels")] = None
    log_prompt_ids: Annotated[bool, Input("Print how every distinct caption is tokenized.", DATA, on=Interface.LOCAL, section="debug")] = False
    foreign_captions: Annotated[bool, Input("Captions of a job file: without a trigger word TOK is text and [trigger] is removed.", DATA, on=Interface.PYTHON)] = False

    # Model.
    base_model: Annotated[str, Input("Model to train on. auto: $BASE_MODEL, else the largest that fits the GPU, and the included miniature test model without a GPU.", MODEL, section="")] = "auto"
    train_placeholder_token: Annotated[bool, Input("Train a placeholder token for the subject. It carries no meaning from pre-training. Off: LoRA only, and trigger_word stands for the subject.", MODEL)] = True
    placeholder_token: Annotated[str, Input("The token, to be used in prompts later.", MODEL, max_length=MAX_LENGTH)] = "<zwx>"
    subjects: Annotated[str | Sequence[str] | None, Input("Several subjects in one LoRA: their tokens with commas, <zwx>,<kul>. TOKEN=FOLDER names the folder of its images in the dataset; default: one with the token's name. Other captions must contain the tokens.", MODEL, max_length=1_000, separator=",", one="subject")] = None
    placeholder_init_std: Annotated[float, Input("Standard deviation of the token's embedding before training. 0 starts from exact zeros.", MODEL, ge=0, le=1)] = 1e-5
    training: Annotated[str, Input("What is trained: a LoRA, or the model's own weights (full), which needs much more memory; the result is then a folder, model, with the whole transformer.", MODEL, choices=TRAININGS, on=Interface.LOCAL)] = "lora"
    adapter: Annotated[str, Input("The form of the LoRA: lora, or dora (also trains the norm of each row of a weight), lokr (a Kronecker product), loha (an elementwise product of two). Fewer programs read the others.", MODEL, choices=tuple(TITLES), on=Interface.LOCAL)] = "lora"
    lokr_factor: Annotated[int, Input("Size of adapter lokr: the first factor has at most so many rows and columns. A lower one learns more and makes a larger file.", MODEL, ge=2, le=256, on=Interface.LOCAL)] = FACTOR
    rank: Annotated[int | None, Input("LoRA rank: higher learns more detail and makes a larger file. Default: depends on the model.", MODEL, ge=1, le=256)] = None
    lora_targets: Annotated[str | Sequence[str], Input("Layers that the LoRA adapts: auto (attention and feed-forward), attention, feed_forward, all, or names and patterns of layers with commas.", MODEL, max_length=1_000, separator=",")] = "auto"
    turbo_adapter: Annotated[str, Input("Training adapter: merged during training, not used at inference, so that a distilled model stays fast. auto: the one made for the model.", MODEL, max_length=1_000)] = "auto"

    # Optimization.
    preset: Annotated[str | None, Input("What the images are for: other defaults for the settings below. quick_test: a fifth of the steps. Default: the model's own settings.", OPTIMIZATION, choices=tuple(PRESETS))] = None
    steps: Annotated[int | None, Input("Optimizer steps. Default: depends on the model and the number of images.", OPTIMIZATION, ge=1, le=MAX_STEPS, unit="optimizer steps", hint="leave it out to have as many as suit the images")] = None
    epochs: Annotated[dict[str, float], Input("Settings that a job file counts in epochs; see trainer.settings.epochs.", OPTIMIZATION, on=Interface.PYTHON)] = {}
    learning_rate: Annotated[float | None, Input("Learning rate of the LoRA. Default: depends on the model.", OPTIMIZATION, ge=0, le=1)] = None
    placeholder_learning_rate: Annotated[float | None, Input("Learning rate of the token's embedding. Default: depends on the model.", OPTIMIZATION, ge=0, le=1)] = None
    optimizer: Annotated[str, Input("prodigy finds the LoRA's learning rate by itself; adamw8bit is for a GPU.", OPTIMIZATION, choices=tuple(OPTIMIZERS))] = "adamw"
    lr_scheduler: Annotated[str | None, Input("Learning rate schedule after the warm-up. Default: depends on the model.", OPTIMIZATION, choices=LR_SCHEDULERS)] = None
    lr_warmup_steps: Annotated[int | None, Input("Steps over which the learning rate rises. Default: a tenth of the steps, at most 20.", OPTIMIZATION, ge=0, le=MAX_STEPS, unit="optimizer steps")] = None
    batch_size: Annotated[int | None, Input("Images per batch. Default: depends on the model.", OPTIMIZATION, ge=1, le=256)] = None
    gradient_accumulation: Annotated[int, Input("Batches per step: like a larger batch, in the memory of a small one.", OPTIMIZATION, ge=1, le=1_000)] = 1
    weight_decay: Annotated[float, Input("Weight decay of the LoRA.", OPTIMIZATION, ge=0, le=1)] = 1e-4
    max_grad_norm: Annotated[float, Input("Gradients are clipped to this norm, those of the LoRA and of the token separately.", OPTIMIZATION, ge=1e-6, le=1e6)] = 1.0
    timestep_sampling: Annotated[str | None, Input("Timestep sampling. sigmoid, logit_normal: mostly middle timesteps. uniform: all equally. shift: the inference schedule. Default: depends on the model.", OPTIMIZATION, choices=TIMESTEP_SAMPLINGS)] = None
    training_shift: Annotated[float | None, Input("Shifts the sampled timesteps towards noise where it is above 1; not with timestep_sampling shift. Default: depends on the model.", OPTIMIZATION, ge=0.1, le=20)] = None
    ema_decay: Annotated[float | None, Input("Save EMA weights with this decay, such as 0.99. 0: no EMA. Default: depends on the preset.", OPTIMIZATION, ge=0, le=0.99999)] = None
    preserve: Annotated[float | str | bool | None, Input("Weight of the rows that keep images of other prompts as the base model makes them: auto, off or a number. auto: by the model; off without a token and trigger word, except for pairs.", OPTIMIZATION, ge=1e-6, le=10, max_length=32, hint="off switches it off")] = "auto"
    regularization: Annotated[str, Input("Images in folders such as reg: auto: preserve keeps what the base model makes of them; off: they are ignored. They are never trained on.", OPTIMIZATION, choices=REGULARIZATIONS, on=Interface.LOCAL)] = "auto"
    preserve_prompts: Annotated[str | Sequence[str] | None, Input("Prompts for preserve, one per line: various ones without the subject, and of the subject (TOK) in new places; for pairs, other instructions. Default: those that come with the model.", OPTIMIZATION, max_length=100_000, separator="\n", one="preservation prompt")] = None
    seed: Annotated[int | None, Input("The same seed and inputs give the same weights. Default: random, and written to meta.json.", OPTIMIZATION, ge=0, le=2**63 - 1)] = None
    resume_from: Annotated[OptionalFile, Input("A checkpoint to resume from, or a weights.zip to train further with a fresh optimizer.", OPTIMIZATION)] = None

    # Memory.
    quantize: Annotated[str, Input("Quantization of the frozen base model, to save memory. auto: chosen by the free memory.", MEMORY, choices=("auto", "none", *QUANTIZATIONS))] = "auto"
    gradient_checkpointing: Annotated[bool | None, Input("Recompute activations: slower, in less memory. Default: chosen by the free memory.", MEMORY)] = None
    low_memory: Annotated[bool | None, Input("Offload weights to CPU memory. Slower; for small GPUs. Default: chosen by the free memory.", MEMORY)] = None
    shard: Annotated[bool | None, Input("Split the frozen base model over the GPUs of a launch with several processes. Default: if it does not fit on each of them.", MEMORY, on=Interface.LOCAL)] = None

    # Output.
    output_dir: Annotated[OptionalFile, Input("The folder of the run. Default: a new one, outputs/DATE-NAME-01.", OUTPUT, on=Interface.LOCAL, section="")] = None
    name: Annotated[str | None, Input("Name of the run, in the name of its folder: outputs/DATE-NAME-01. Default: the dataset's name.", OUTPUT, max_length=64, section="")] = None
    checkpoint_every: Annotated[int | None, Input("Write a checkpoint every so many steps, to resume from. 0: only at the end and when the run is stopped. Default: ten times in a run, and at least every 10 minutes.", OUTPUT, ge=0, le=MAX_STEPS, unit="optimizer steps")] = None
    weights_every: Annotated[int, Input("Also save usable weights every so many steps, in saved/; all are kept. With training full each is as large as the model. 0: none.", OUTPUT, ge=0, le=MAX_STEPS, on=Interface.LOCAL, unit="optimizer steps")] = 0
    sample_prompts: Annotated[str | Sequence[str] | None, Input("Prompts for preview images, one per line. Default: a caption and one other prompt, before, halfway and at the end; empty text: none. TOK is the subject. Options behind a prompt: --w --h --s (steps) --d (seed) --l (guidance) --n (negative prompt).", OUTPUT, max_length=20_000, separator="\n", one="sample prompt", section="sample", key="prompts")] = None
    sample_every: Annotated[int, Input("Generate the preview images every so many steps. 0: only at the end.", OUTPUT, ge=0, le=MAX_STEPS, section="sample", key="every", unit="optimizer steps")] = 0
    sample_options: Annotated[dict[str, Any], Input("Options of all preview images: inputs of generation by their names.", OUTPUT, on=Interface.PYTHON)] = {}
    validation_every: Annotated[int | None, Input("Measure the loss on fixed noise every so many steps, on held-out images if there are any. 0: never, nothing is held out. Default: about ten times.", OUTPUT, ge=0, le=MAX_STEPS, unit="optimizer steps")] = None
    validation_images: Annotated[int | str | None, Input("Images that are held out to measure the validation loss, and not trained on: auto or a number. auto: from 20 images on, one in ten (at most 8).", OUTPUT, ge=0, le=MAX_STEPS, max_length=16)] = "auto"
    keep_best: Annotated[bool, Input("Save the weights with the lowest validation loss instead of the last ones. Needs held-out images.", OUTPUT)] = False
    early_stopping: Annotated[bool, Input("End the run if the validation loss has not reached a new minimum for 30 % of the steps. Needs held-out images.", OUTPUT)] = False
    hf_repo_id: Annotated[str | None, Input("OWNER/NAME of a Hugging Face repository that the result is uploaded to, with a model card.", OUTPUT, max_length=128)] = None
    allow_failed_checks: Annotated[bool, Input("Upload to hf_repo_id even if a check of the result fails.", OUTPUT, on=Interface.LOCAL)] = False

    # Tracking.
    trackers: Annotated[str | Sequence[str] | None, Input("Where to follow the run, with commas: tensorboard, wandb, trackio.", TRACKING, max_length=64, choices=TRACKERS, separator=",")] = None
    wandb_project: Annotated[str | None, Input("Project of the run, in wandb or trackio. Default: zeroprior.", TRACKING, max_length=128)] = None
    wandb_run: Annotated[str | None, Input("Name of the run, in wandb or trackio. Default: chosen by the tracker.", TRACKING, max_length=128)] = None
    wandb_entity: Annotated[str | None, Input("Weights & Biases user or team of the run. Default: the key's own.", TRACKING, max_length=128)] = None
    # fmt: on
    @field_validator("dataset", mode="before")
    @classmethod
    def _not_empty(cls, value: Any) -> Any:
        if str(value) == "":
            raise ValueError(f"dataset is missing; {cls.inputs()['dataset'].hint}")
        return value

    @field_validator("trigger_word", "subjects", mode="before")
    @classmethod
    def _empty_is_none(cls, value: Any) -> Any:
        return None if isinstance(value, str) and not value.strip() else value

    @field_validator("validation_images", mode="before")
    @classmethod
    def _auto_or_number(cls, value: Any) -> Any:
        if type(value) not in (int, str, type(None)):
            raise ValueError(
                f"validation_images is {value!r}; it must be auto or a number of images"
            )
        return value

    @field_validator("epochs")
    @classmethod
    def _counted(cls, value: dict[str, float]) -> dict[str, float]:
        for name, number in value.items():
            if not 0 <= number <= MAX_STEPS:  # also of NaN
                raise ValueError(
                    f"{name} is counted in epochs, and one number for it is {number:g}; it must be "
                    f"between 0 and {MAX_STEPS:,}"
                )
        return value

    @field_validator("masks", "regularization", mode="before")
    @classmethod
    def _off(cls, value: Any) -> Any:
        return "off" if value is False else value  # YAML reads `off` as false

    @field_validator("preserve", mode="before")
    @classmethod
    def _weight(cls, value: Any) -> Any:
        if value is True or not isinstance(value, float | int | str | None):
            raise ValueError(
                f"preserve is {str(value)[:80]}; it must be auto, off, or a number above 0 and at "
                "most 10"
            )
        return "off" if value is False else value  # YAML reads `off` as false

    @field_validator(*NAMES, mode="before")
    @classmethod
    def _plain_name(cls, value: Any, info: ValidationInfo) -> Any:
        most = LENGTHS[str(info.field_name)]
        if isinstance(value, str) and (fault := fault_of_name(value, most)):
            raise ValueError(
                f"{info.field_name} {value[:80]!r} {fault}; use a plain name such as red-fox"
            )
        return value


INPUTS = TrainingInputs.inputs()
# Bounds of numbers, choices of names, and characters of texts, by the input's name.
RANGES: dict[str, tuple[float, float]] = {
    name: (each.ge, each.le)
    for name, each in INPUTS.items()
    if each.ge is not None and each.le is not None
}
CHOICES = {name: each.choices for name, each in INPUTS.items() if each.choices}
LENGTHS = {name: each.max_length for name, each in INPUTS.items() if each.max_length is not None}
