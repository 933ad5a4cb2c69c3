"""Writes captions with a vision-language model, without what is the same in all images."""

from trainer.captions.captioning import caption_dataset, captions_of_run, doubtful
from trainer.captions.questions import STYLE_SET, SUBJECT_SET, Identity
from trainer.captions.writing import Captioned, Wishes

__all__ = [
    "STYLE_SET",
    "SUBJECT_SET",
    "Captioned",
    "Identity",
    "Wishes",
    "caption_dataset",
    "captions_of_run",
    "doubtful",
]
