"""Reads and writes LoRA files, in every supported layout."""

from adapters.formats.deltas import Delta, Deltas, as_delta, bytes_of, is_zero
from adapters.formats.factors import Factors, LoraMismatch, check_fits, rank_of, shown
from adapters.formats.file_kinds import CHECKPOINT_HEADER, Shapes
from adapters.formats.layout import BIAS, Layout, is_linear
from adapters.formats.lora_file import (
    MAX_BYTES,
    BrokenLora,
    as_written,
    lora_bytes,
    open_lora,
    open_tensors,
    parse_lora,
    plain_factors,
    read_deltas,
    read_tensors,
    refuse_other_kinds,
)
from adapters.formats.lora_header import CONFIG, MAX_CONFIG_BYTES, titles
from adapters.formats.peft_config import config_beside, config_member, config_text

__all__ = [
    "BIAS",
    "BrokenLora",
    "CHECKPOINT_HEADER",
    "CONFIG",
    "Delta",
    "Deltas",
    "Factors",
    "Layout",
    "LoraMismatch",
    "MAX_BYTES",
    "MAX_CONFIG_BYTES",
    "Shapes",
    "as_delta",
    "as_written",
    "bytes_of",
    "check_fits",
    "config_beside",
    "config_member",
    "config_text",
    "is_linear",
    "is_zero",
    "lora_bytes",
    "open_lora",
    "open_tensors",
    "parse_lora",
    "plain_factors",
    "rank_of",
    "read_deltas",
    "read_tensors",
    "refuse_other_kinds",
    "shown",
    "titles",
]
