"""The Cog face of training: a dataset in, `weights.zip` out.

Cog reads the inputs below at build time without running this file: every default, bound and
description is a literal, on purpose. All behaviour is in `trainer`.
"""

from typing import Optional

from cog import BaseModel, Input, Path

from serving.inputs import logged, metric, plain

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


class TrainingOutput(BaseModel):
    weights: Path


# fmt: off
def train(
    dataset: Path = Input(description="Zip or tar of 10 to 40 pictures (jpg, png, webp), with an optional caption in NAME.txt beside each NAME.jpg.", accept=".zip,.tar,application/zip,application/x-tar"),
    base_model: str = Input(description="Model to train on. auto takes $BASE_MODEL, else qwen-image on a GPU and the embedded miniature without one.", default="auto", choices=BASE_MODELS),
    default_caption: str = Input(description="Caption of pictures that have none of their own. TOK stands for your subject.", default="a photo of TOK"),
    train_placeholder_token: bool = Input(description="Teach a new word without any prior meaning for your subject. Off: train the LoRA alone, with the captions as written.", default=True),
    placeholder_token: str = Input(description="The new word, to be used in prompts later.", default="<zwx>", max_length=64),
    placeholder_init_std: float = Input(description="Standard deviation of the new word's embedding before training. 0 starts from exact zeros.", default=1e-5, ge=0, le=1),
    turbo_adapter: str = Input(description="Adapter that keeps turbo models fast: merged while training, gone when drawing. auto: the one made for the model.", default="auto", choices=["auto", "v1", "v2", "none"]),
    rank: Optional[int] = Input(description="LoRA rank: higher remembers more detail and makes a larger file. Empty: what suits the model.", default=None, ge=1, le=256),
    steps: Optional[int] = Input(description="Optimiser steps. Empty: what suits the model.", default=None, ge=1, le=20000),
    learning_rate: Optional[float] = Input(description="Learning rate of the LoRA. Empty: what suits the model.", default=None, ge=0, le=1),
    batch_size: Optional[int] = Input(description="Pictures per step. Empty: what suits the model.", default=None, ge=1, le=64),
    resolution: Optional[str] = Input(description="Edge length in pixels the pictures are trained at, or several with commas (512,768,1024). Empty: what suits the model.", default=None, max_length=64),
    caption_dropout: Optional[float] = Input(description="Share of the pictures that are shown with an empty caption. Empty: what suits the model.", default=None, ge=0, le=1),
    seed: Optional[int] = Input(description="The same seed and inputs give the same weights. Empty: drawn at random and written into meta.json.", default=None, ge=0),
) -> TrainingOutput:
    """Train a LoRA, and with it a new word for the subject, from a zip of pictures."""
    inputs = plain(locals())
    with logged():
        from trainer.run import train_from_inputs

        return TrainingOutput(weights=Path(train_from_inputs(metric, **inputs)))
# fmt: on
