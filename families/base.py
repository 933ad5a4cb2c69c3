"""The dataclasses that describe a base model, used by the files in `families/models/`.

What differs between two base models is a field here, never a branch elsewhere. Defaults that a user
may override (steps, learning rates, guidance) are fields of `Base`; each names its source.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

Config = Mapping[str, Any]  # the config.json of a model


@dataclass(frozen=True)
class AdapterFile:
    """A training adapter: one LoRA file in a separate repository."""

    hub_id: str
    name: str  # of the file
    included: Path | None = None  # its folder, where this project includes it


@dataclass(frozen=True)
class Steps:
    """Optimizer steps in proportion to the number of training images, between two bounds."""

    per_image: int
    least: int
    most: int


@dataclass(frozen=True)
class Terms:
    """What a license that is not free asks of users, and of LoRAs that are trained on the model."""

    # In words for users: shown at the download and in plans, written into LoRAs and model cards.
    notice: str
    url: str  # the license's text
    hub_name: str  # its name in a model card's metadata


@dataclass(frozen=True, kw_only=True)
class Base:
    """One base model: where its files are, and its default settings."""

    name: str
    hub_id: str  # ORG/NAME on the Hub, and below $MODEL_VAULT
    family: str  # `Family.name` of its architecture
    completed_by: "Base | None" = None  # supplies the components that this repository lacks
    included: Path | None = None  # its folder, where this project includes it
    folder: Path | None = None  # a folder that the user named, in place of all others
    license: str = ""  # of the weights, as an SPDX name or a title; empty: not known here
    terms: Terms | None = None  # of a license that is not free
    download: float | None = None  # GB of the repository's files that are used; None: not known
    distilled: bool = False  # for few steps without guidance; plain training destroys that
    # Training adapters (LoRAs that undo the distillation, applied while training) by version; the
    # last is the default.
    training_adapters: dict[str, AdapterFile] = field(default_factory=dict)
    # LoRAs for this base are trained on that one, and are used here unchanged.
    train_on: "Base | None" = None
    alpha_channel: bool = False  # whether its VAE has one, so that images can be transparent
    most_references: int = 0  # reference images that it takes; 0: it is not an editing model
    needs_references: bool = False  # it only edits, so it needs at least one
    # Of a base that takes them: the share of attention in the FLOPs of a pass at
    # `default_resolution`, as the limit of a request's compute counts it
    # (tests/inference/test_editing.py).
    attention_share: float = 0.0

    # Generation, as the models' own cards recommend. Guidance 1 is off.
    inference_steps: int
    guidance_scale: float
    # A fixed schedule of the model, from 1 down, without the last 0; empty: by the scheduler.
    # `sample_sigmas` in model_index.json.
    sample_sigmas: tuple[float, ...] = ()
    default_resolution: int  # pixels, edge of the square image it generates best
    # The same beside reference images, and of these images; None: `default_resolution`.
    editing_resolution: int | None = None
    # The same of the largest image that its card recommends, if that is larger.
    recommended_up_to: int = 0
    # Pixels, edge of the square with as many pixels as the largest image that is accepted, for
    # training and for generation. Published models: twice their default edge. Larger images repeat
    # the subject, and decoding takes more than 29 GB.
    largest_resolution: int = 2048
    # Width and height are multiples of this: `Family.resolution_multiple`, known before loading.
    size_multiple: int = 16

    # GB of free GPU memory that `auto` requires, counted as in the memory plan
    # (`tests/families/test_bases.py`):
    # to generate an image of the default resolution with the whole model in 16 bits; and to train
    # with these settings and a placeholder, in int8 with gradient checkpointing.
    generation_memory: float
    training_memory: float
    # GB more than `generation_memory` with three reference images, of a base that can do without.
    editing_memory: float = 0.0

    # Training. LoRA targets are the family's (`Family.lora_targets`): attention and feed-forward
    # of the blocks, as musubi-tuner and OneTrainer train both models. Alpha is the rank.
    training_resolution: int  # pixels; the size that trainers' examples for these models use
    rank: int = 32  # ai-toolkit and musubi-tuner for Z-Image; for Qwen-Image they and others 16-64
    learning_rate: float = 1e-4  # ai-toolkit and SimpleTuner for both models
    # Adam changes a value by about the learning rate in each step, and the values of embeddings are
    # hundredths: tens of steps from zero to the norm of a known token's embedding.
    placeholder_learning_rate: float = 1e-3
    lr_scheduler: str = "constant"  # ai-toolkit, musubi-tuner
    # 1000 is the default of SimpleTuner's example and of Replicate's Qwen-Image and FLUX trainers,
    # 3000 ai-toolkit's; between them in proportion to the images.
    training_steps: Steps = Steps(per_image=100, least=1000, most=3000)
    batch_size: int = 1  # all of these trainers
    caption_dropout: float = 0.05  # ai-toolkit
    # What `preserve: auto` is, measured on the miniature only; and the file of prompts in
    # `trainer/learning/preservation_prompts/`.
    preservation: float = 0.5
    preservation_prompts: str = "general"
    timestep_sampling: str = "sigmoid"  # musubi-tuner; ai-toolkit's and SimpleTuner's base default
    training_shift: float  # of that sampling: musubi-tuner's documents, 2.0 and 2.2

    # The default preview whose prompt is unlike the dataset; TOK is the subject.
    preview_prompt: str = "a photo of TOK on a beach"
    preview_prompt_without_subject: str = "a photo of a dog on a beach"

    @property
    def reference_resolution(self) -> int:
        """Pixels, edge of the square with as many pixels as a reference image, and by default as
        the edited one."""
        return self.editing_resolution or self.default_resolution

    @property
    def reference_counts(self) -> tuple[int, int]:
        """Reference images that it needs, and takes at most."""
        return int(self.needs_references), self.most_references

    @property
    def license_facts(self) -> dict[str, str]:
        """What the license asks for in the metadata of a LoRA for this base; empty if nothing."""
        if self.terms is None:
            return {}
        facts = {"license_notice": self.terms.notice, "license_url": self.terms.url}
        return {"license": self.license, **facts} if self.license else facts


@dataclass(frozen=True)
class ModelClasses:
    """Names of the classes in a repository's model_index.json."""

    pipeline: str  # diffusers
    editing_pipeline: str = field(default="", kw_only=True)  # of the family's editing models
    transformer: str  # diffusers
    vae: str  # diffusers
    text_encoder: str  # transformers


@dataclass(frozen=True)
class CardCode:
    """What the example on a model card needs to call the family's pipeline in diffusers."""

    # Python that sets `text` to the prompt inside its template, indented by four; it may use
    # `pipeline` and `prompt`.
    template: str
    # Python that returns the text features of `embeds`, indented by four.
    features: str
    guidance: str  # the pipeline's argument for classifier-free guidance
    guidance_off: int  # the value of that argument which is guidance 1 here
    tokenizer: str = "pipeline.tokenizer"
    # Of the editing pipeline: Python that prepares `pipeline`, and its argument for
    # `Base.reference_resolution`.
    editing_setup: str = ""
    editing_size: str = ""


@dataclass(frozen=True)
class JobNames:
    """A family in the job files of another training program (`trainer.settings.jobs`)."""

    names: tuple[str, ...]  # what the program calls it
    lora_targets: str = "all"  # layers that the program adapts by default
    groups: tuple[str, ...] = ()  # parts of layers' names that are groups of `lora_targets`
    # Names of versions there: base model and training adapter.
    flavours: Mapping[str, tuple[str, str | None]] = field(default_factory=dict)
    # Classes of modules there: `lora_targets` for all their linear layers.
    modules: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class FewStepRow:
    """A published LoRA that makes a base model generate in a few steps, and its settings.

    Guidance 1 is off. `shift` is the static shift of the sigma schedule, without a terminal shift
    (see `Family.sigmas`); None is the base's own schedule.
    """

    name: str
    # Searched in a file's name or a title, in lower case, words joined by hyphens.
    pattern: re.Pattern[str]
    steps: int  # where the name contains no number of steps
    shift: float | None
    guidance_scale: float = 1.0


# Ways to name the tensors of a plain LoRA in files.
TRANSFORMER = "transformer.…lora_A"
DIFFUSION_MODEL = "diffusion_model.…lora_A"
BARE = "…lora_down without a prefix"
KOHYA = "lora_unet_…lora_down"
LORA_STYLES = (TRANSFORMER, DIFFUSION_MODEL, BARE, KOHYA)


@dataclass(frozen=True)
class LoraReader:
    """How another program reads a family's LoRAs (`adapters.formats.programs`)."""

    reads: tuple[str, ...]  # the styles that it reads completely
    writes: str  # the one that a conversion chooses
    embedding: bool = False  # it reads a token's embedding from a file
    note: str = ""
