"""Reads and writes LoRA files, in every supported layout."""

from adapters.formats.deltas import Delta, Deltas, Dora, as_delta, bytes_of, is_zero
from adapters.formats.factors import Factors, LoraMismatch, check_fits, rank_of, shown
from adapters.formats.file_kinds import CHECKPOINT_HEADER, Shapes
from adapters.formats.idle import completed, family_of_layers, without_idle
from adapters.formats.layer_names import OTHER_COMPONENTS, without_fronts, without_wrappers
from adapters.formats.layout import BIAS, Layout, is_linear, spellings
from adapters.formats.lora_file import (
    MAX_BYTES,
    BrokenLora,
    StoredLayer,
    as_written,
    lora_size,
    open_lora,
    open_tensors,
    parse_lora,
    plain_factors,
    read_deltas,
    read_tensors,
    refuse_other_kinds,
    stored_layers,
    write_lora,
)
from adapters.formats.lora_formats import ALPHA, DOWN, MAGNITUDE, UP, split_key
from adapters.formats.lora_header import CONFIG, MAX_CONFIG_BYTES, titles
from adapters.formats.peft_config import config_beside, config_member, config_text
from adapters.formats.programs import PROGRAMS, Found, Program, verdict

__all__ = [
    "ALPHA",
    "BIAS",
    "BrokenLora",
    "CHECKPOINT_HEADER",
    "CONFIG",
    "DOWN",
    "Delta",
    "Deltas",
    "Dora",
    "Factors",
    "Found",
    "Layout",
    "LoraMismatch",
    "MAGNITUDE",
    "MAX_BYTES",
    "MAX_CONFIG_BYTES",
    "OTHER_COMPONENTS",
    "PROGRAMS",
    "Program",
    "Shapes",
    "StoredLayer",
    "UP",
    "as_delta",
    "as_written",
    "bytes_of",
    "check_fits",
    "completed",
    "config_beside",
    "config_member",
    "config_text",
    "family_of_layers",
    "is_linear",
    "is_zero",
    "lora_size",
    "open_lora",
    "open_tensors",
    "parse_lora",
    "plain_factors",
    "rank_of",
    "read_deltas",
    "read_tensors",
    "refuse_other_kinds",
    "shown",
    "spellings",
    "split_key",
    "stored_layers",
    "titles",
    "verdict",
    "without_fronts",
    "without_idle",
    "without_wrappers",
    "write_lora",
]
