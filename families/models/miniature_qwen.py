"""The included test model with the classes of Qwen-Image-2.1 (docs/miniature.md)."""

from pathlib import Path

from families.base import Base, Steps

# Its values are those of the first miniature, tuned there (`families.models.z_image`); the learning
# rate is from `lab.experiments.editing.study`.
MINIATURE_QWEN = Base(
    name="miniature-qwen",
    hub_id="zeroprior/miniature-qwen",
    family="qwen_image_21",
    included=Path(__file__).resolve().parents[2] / "miniature" / "weights" / "miniature-qwen",
    license="Apache-2.0",  # this project's
    most_references=1,  # it was trained with one
    inference_steps=25,
    guidance_scale=2.0,
    default_resolution=128,
    largest_resolution=512,
    size_multiple=32,
    generation_memory=0.1,
    training_memory=0.5,
    training_resolution=128,
    learning_rate=3e-3,
    placeholder_learning_rate=0.05,
    lr_scheduler="cosine",
    training_steps=Steps(per_image=0, least=500, most=500),
    batch_size=8,
    caption_dropout=0.0,
    preservation_prompts="shapes",
    training_shift=3.0,
    preview_prompt="a TOK in the desert",
    preview_prompt_without_subject="a red star in the desert",
)
