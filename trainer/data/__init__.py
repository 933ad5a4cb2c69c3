"""Reads and checks a dataset: images, captions, buckets. Imports no PyTorch."""

from trainer.data.buckets import Bucket, bucket_sizes, cover, crop, crop_shifts, nearest_bucket
from trainer.data.caption_checks import caption_checks
from trainer.data.captions import choose_captions
from trainer.data.check_sheet import write_sheet
from trainer.data.checks import DatasetCheck, Purpose, check_dataset, check_examples, log_checks
from trainer.data.dataset import (
    DatasetError,
    Example,
    Findings,
    examine,
    read_dataset,
)
from trainer.data.example import own_captions
from trainer.data.file_lists import members_of_any, opener
from trainer.data.findings import Finding
from trainer.data.hub import local_dataset
from trainer.data.images import Checked, check, probe
from trainer.data.mapped_file import Content, MappedFile
from trainer.data.masks import BLACK, OUTSIDE
from trainer.data.measures import Measures, measure
from trainer.data.members import (
    CAPTION_SUFFIXES,
    HEAD_BYTES,
    IMAGE_SUFFIXES,
    MAX_CAPTION_BYTES,
    MAX_MEMBER_BYTES,
    MAX_TABLE_BYTES,
    TABLE_SUFFIXES,
    Unusable,
    can_be_image,
    is_image,
    listed,
    members_of,
    read_members,
    stem_of,
    suffix_of,
)
from trainer.data.roles import Roles, roles_of
from trainer.data.similarity import alike, stacked
from trainer.data.threads import in_threads
from trainer.data.trigger import name_trigger

__all__ = [
    "BLACK",
    "CAPTION_SUFFIXES",
    "HEAD_BYTES",
    "IMAGE_SUFFIXES",
    "MAX_CAPTION_BYTES",
    "MAX_MEMBER_BYTES",
    "MAX_TABLE_BYTES",
    "OUTSIDE",
    "TABLE_SUFFIXES",
    "Bucket",
    "Checked",
    "Content",
    "DatasetCheck",
    "DatasetError",
    "Example",
    "Finding",
    "Findings",
    "MappedFile",
    "Measures",
    "Purpose",
    "Roles",
    "Unusable",
    "alike",
    "bucket_sizes",
    "can_be_image",
    "caption_checks",
    "check",
    "check_dataset",
    "check_examples",
    "choose_captions",
    "cover",
    "crop",
    "crop_shifts",
    "examine",
    "in_threads",
    "is_image",
    "listed",
    "local_dataset",
    "log_checks",
    "measure",
    "members_of",
    "members_of_any",
    "name_trigger",
    "nearest_bucket",
    "opener",
    "own_captions",
    "probe",
    "read_dataset",
    "read_members",
    "roles_of",
    "stacked",
    "stem_of",
    "suffix_of",
    "write_sheet",
]
