"""The table of base models: where each lies and which settings are right for it.

What differs between two bases is a column here, never a branch elsewhere. Numbers that a user may
leave out (steps, rates, guidance) come from this table; each column names its source.
"""

import difflib
import json
import logging
import os
from dataclasses import dataclass, field, replace
from pathlib import Path

from families.redact import safe_name

log = logging.getLogger(__name__)

REPOSITORY = Path(__file__).resolve().parent.parent


class UnknownBase(ValueError):
    """A base model that is neither in the table nor a folder in the Hub's layout."""


@dataclass(frozen=True)
class AdapterFile:
    """A training adapter: one LoRA file in a repository of its own."""

    hub_id: str
    name: str  # of the file
    folder: Path | None = None  # where it lies when it is not fetched by its Hub id


@dataclass(frozen=True)
class Steps:
    """Optimiser steps in proportion to a dataset's pictures, between two bounds."""

    per_picture: int
    least: int
    most: int


@dataclass(frozen=True, kw_only=True)
class Base:
    """One base model: its place and the settings that suit it."""

    name: str
    hub_id: str  # ORG/NAME on the Hub, and below $MODEL_VAULT
    family: str  # the file in families/ that knows its mathematics
    completed_by: str | None = None  # Hub id that supplies the components this repository lacks
    folder: Path | None = None  # where it lies when it is not fetched by its Hub id
    distilled: bool = False  # made for few steps without guidance; plain training undoes that
    # LoRAs that take that damage in a training's stead, by version; the last is the default.
    training_adapters: dict[str, AdapterFile] = field(default_factory=dict)

    # ResolvedRequest, as the models' own cards recommend. Guidance 1 is off.
    inference_steps: int
    guidance_scale: float
    default_resolution: int  # pixels, edge of the square picture it draws best
    # Pixels, edge of the square with as many pixels as the largest image that is accepted, for
    # training and for generation. Published models: twice their own edge; beyond, they repeat the
    # subject, and decoding takes more than 29 GB.
    largest_resolution: int = 2048

    # GB of memory that `auto` asks a GPU for, counted as a plan counts
    # (`tests/families/test_bases.py`):
    # to generate an image of the default resolution with the whole model in 16 bits; and to train
    # with this table's settings and a placeholder, in int8 with gradient checkpointing.
    generation_memory: float
    training_memory: float

    # Training. LoRA targets are the family's (`Family.lora_targets`): attention and feed-forward
    # of the blocks, as musubi-tuner and OneTrainer train both models. Alpha is the rank.
    training_resolution: int  # pixels; the size that trainers' examples for these models use
    rank: int = 32  # ai-toolkit and musubi-tuner for Z-Image; for Qwen-Image they and others 16-64
    learning_rate: float = 1e-4  # ai-toolkit and SimpleTuner for both models
    # Adam moves an entry by about the rate in each step, and embeddings' entries are hundredths:
    # tens of steps from zero to a word's size.
    placeholder_learning_rate: float = 1e-3
    lr_scheduler: str = "constant"  # ai-toolkit, musubi-tuner
    # 1000 is the default of SimpleTuner's example and of Replicate's Qwen-Image and FLUX trainers,
    # 3000 ai-toolkit's; between them in proportion to the pictures.
    training_steps: Steps = Steps(per_picture=100, least=1000, most=3000)
    batch_size: int = 1  # all of them
    caption_dropout: float = 0.05  # ai-toolkit
    timestep_sampling: str = "sigmoid"  # musubi-tuner; ai-toolkit's and SimpleTuner's base default
    training_shift: float  # of that sampling: musubi-tuner's documents, 2.0 and 2.2

    # The default preview that is far from the dataset; TOK is the subject.
    preview_prompt: str = "a photo of TOK on a beach"
    preview_prompt_without_subject: str = "a photo of a dog on a beach"


Z_IMAGE_TURBO = Base(
    name="z-image-turbo",
    hub_id="Tongyi-MAI/Z-Image-Turbo",
    family="z_image",
    distilled=True,
    training_adapters={
        version: AdapterFile(
            "ostris/zimage_turbo_training_adapter",
            f"zimage_turbo_training_adapter_{version}.safetensors",
        )
        for version in ("v1", "v2")
    },
    inference_steps=8,
    guidance_scale=1.0,
    default_resolution=1024,
    generation_memory=23.8,
    training_memory=17.9,
    training_resolution=1024,
    training_shift=2.0,
)

QWEN_IMAGE = Base(
    name="qwen-image",
    hub_id="Qwen/Qwen-Image",
    family="qwen_image",
    inference_steps=50,
    guidance_scale=4.0,
    default_resolution=1328,
    generation_memory=56.8,
    training_memory=40.2,
    training_resolution=1024,
    training_shift=2.2,
)

# The embedded bases are small and run on a CPU: higher rates, fewer and larger steps. Found by
# trial on the demo's subject, a handful of runs; the placeholder's rate may be ten times less or
# five times more (docs/zero_prior.md).
MINIATURE_TURBO = Base(
    name="miniature-turbo",
    hub_id="zeroprior/miniature-turbo",
    family="z_image",
    folder=REPOSITORY / "miniature" / "weights" / "miniature-turbo",
    distilled=True,
    training_adapters={
        "v1": AdapterFile(
            "zeroprior/miniature-turbo-training-adapter",
            "miniature_turbo_training_adapter.safetensors",
            REPOSITORY / "miniature" / "weights" / "training_adapter",
        )
    },
    inference_steps=8,
    guidance_scale=1.0,
    default_resolution=64,
    # Four times its own edge: 1 s a step on one CPU core, where 1000 pixels take 47 s.
    largest_resolution=256,
    generation_memory=0.1,
    training_memory=0.5,
    training_resolution=64,
    learning_rate=4e-3,
    placeholder_learning_rate=2e-2,
    lr_scheduler="cosine",
    training_steps=Steps(per_picture=0, least=500, most=500),
    batch_size=8,
    training_shift=3.0,
    preview_prompt="a TOK in the desert",
    preview_prompt_without_subject="a red star in the desert",
)

_ALL = (
    QWEN_IMAGE,
    replace(QWEN_IMAGE, name="qwen-image-2512", hub_id="Qwen/Qwen-Image-2512"),
    Z_IMAGE_TURBO,
    replace(
        Z_IMAGE_TURBO,
        name="z-image",
        hub_id="Tongyi-MAI/Z-Image",
        distilled=False,
        training_adapters={},
        inference_steps=50,
        guidance_scale=5.0,  # the card's 4 counts from zero, as its pipeline does
    ),
    replace(
        Z_IMAGE_TURBO,
        name="z-image-de-turbo",
        hub_id="ostris/Z-Image-De-Turbo",
        completed_by="Tongyi-MAI/Z-Image-Turbo",
        distilled=False,
        training_adapters={},
        inference_steps=25,
        # The card's 2 to 3 are on the usual scale: its author's trainer subtracts one before it
        # calls the pipeline (ai-toolkit 27a03a91, `z_image.py`), and starts from 3 for this model.
        guidance_scale=2.5,
    ),
    MINIATURE_TURBO,
    replace(
        MINIATURE_TURBO,
        name="miniature",
        hub_id="zeroprior/miniature",
        completed_by="zeroprior/miniature-turbo",
        folder=REPOSITORY / "miniature" / "weights" / "miniature",
        distilled=False,
        training_adapters={},
        inference_steps=25,
        guidance_scale=2.0,
    ),
)

BASES: dict[str, Base] = {base.name: base for base in _ALL}
_BY_HUB_ID = {base.hub_id: base for base in _ALL}
_MAX_INDEX_BYTES = 1 << 20
_BY_PIPELINE_CLASS = {"ZImagePipeline": "z-image", "QwenImagePipeline": "qwen-image"}


def find_base(name: str) -> Base:
    """The row of a short name or a Hub id. Raises `UnknownBase`.

    For names from files: a weights file from an untrusted user cannot name a folder.
    """
    known = BASES.get(name) or _BY_HUB_ID.get(name)
    if known is None:
        raise UnknownBase(
            f"base_model {_shown(name)} is not one of {', '.join(BASES)}{_hint(name)}"
        )
    return known


def find_base_or_folder(name: str) -> Base:
    """The base that a person names: as `find_base`, or a local folder in the Hub's layout.

    A folder whose last part is a published name (`…/Z-Image-Turbo`) takes that model's settings,
    any other folder those of its family's undistilled model. Raises `UnknownBase`.
    """
    known = BASES.get(name) or _BY_HUB_ID.get(name)
    if known is not None:
        return known
    try:
        folder = Path(name).expanduser().absolute()
        text = (folder / "model_index.json").read_bytes()[:_MAX_INDEX_BYTES]
    except (OSError, ValueError, RuntimeError):  # not there, not a name, the home of nobody
        raise UnknownBase(
            f"base_model {_shown(name)} is neither one of {', '.join(BASES)} nor a folder with a "
            f"model_index.json{_hint(name)}"
        ) from None
    row = BASES[_BY_PIPELINE_CLASS[_pipeline(text, f"{_shown(name)}: model_index.json")]]
    by_folder_name = {base.hub_id.split("/")[1]: base for base in _ALL}
    published = by_folder_name.get(folder.name)
    if published is not None:  # a copy of a published model: its weights.zip is good anywhere
        return replace(published, folder=folder)
    # Only the name, since it is written into files that are passed on.
    return replace(row, name=folder.name, hub_id=folder.name, folder=folder)


def _pipeline(index: bytes, source: str) -> str:
    """The pipeline class in a model_index.json, one of those that are known."""
    try:
        content = json.loads(index)
    except (ValueError, RecursionError) as error:
        raise UnknownBase(f"{source} is not JSON; download the model again") from error
    pipeline = content.get("_class_name") if isinstance(content, dict) else None
    if not isinstance(pipeline, str) or pipeline not in _BY_PIPELINE_CLASS:
        known = ", ".join(_BY_PIPELINE_CLASS)
        raise UnknownBase(f"{source}: pipeline {_shown(pipeline)} is not one of {known}")
    return pipeline


def _shown(value: object) -> str:
    """A name from a user or a file on one short line."""
    text = safe_name(value) if isinstance(value, str) else type(value).__name__
    return ascii(text[:100]) if not text[:100].isprintable() else repr(text[:100])


def _hint(name: str) -> str:
    near = difflib.get_close_matches(name[:100], [*BASES, *_BY_HUB_ID], n=1)
    return f"; did you mean {near[0]!r}?" if near else ""


def by_hub_id(hub_id: str) -> Base | None:
    """The table's row of a Hub id, or None."""
    return _BY_HUB_ID.get(hub_id)


NO_GPU = (
    "No GPU: using the miniature test model. It only knows simple shapes. Choose a model with "
    "--base_model."
)

# What `auto` chooses from on a GPU, the largest first.
_AUTOMATIC = (QWEN_IMAGE, Z_IMAGE_TURBO)


def default_base(purpose: str = "generation") -> Base:
    """What `auto` means when no weights say otherwise; the log says what and why.

    `$BASE_MODEL`; else the largest base that fits the GPU's free memory for the purpose,
    generation or training; the included miniature without a GPU.
    """
    named = os.environ.get("BASE_MODEL")
    if named:
        base, why = find_base_or_folder(named), "$BASE_MODEL"
    else:
        base, why = _by_memory(purpose)
    if base is MINIATURE_TURBO and not named:
        log.info(NO_GPU)
        return base
    log.info("base_model auto: %s (%s)", base.name, why)
    return base


def _by_memory(purpose: str) -> tuple[Base, str]:
    import torch  # takes a second, which a look into the table need not wait for

    from families.memory import RESERVE, free_memory

    if not torch.cuda.is_available():
        return MINIATURE_TURBO, "no GPU"
    room = free_memory(torch.device("cuda")) / 1e9 * (1 - RESERVE)
    needs = [(base, getattr(base, f"{purpose}_memory")) for base in _AUTOMATIC]
    report_data = ", ".join(f"{base.name} {need:.1f} GB" for base, need in needs)
    report_data = f"of {room:.1f} GB, {purpose} needs: {report_data}"
    for base, need in needs:
        if need <= room:
            return base, report_data
    return _AUTOMATIC[-1], f"{report_data}; none fits, and this is the smallest"
