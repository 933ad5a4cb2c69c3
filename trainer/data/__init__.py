"""Reads and checks a dataset: images, captions, buckets. Imports no PyTorch."""

from trainer.data.buckets import Bucket, cover, nearest_bucket, warn_upscaled
from trainer.data.dataset import DatasetError, Example, read_dataset
from trainer.data.mapped_file import MappedFile
from trainer.data.members import IMAGE_SUFFIXES, listed
from trainer.data.threads import in_threads
from trainer.data.trigger import name_trigger

__all__ = [
    "Bucket",
    "DatasetError",
    "Example",
    "IMAGE_SUFFIXES",
    "MappedFile",
    "cover",
    "in_threads",
    "listed",
    "name_trigger",
    "nearest_bucket",
    "read_dataset",
    "warn_upscaled",
]
