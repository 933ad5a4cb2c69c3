"""Inspects, converts, merges and resizes LoRA files (`python -m adapters`)."""

from adapters.tools.bake import DTYPES, LAYOUTS, Baked, bake, check_output
from adapters.tools.convert import Converted, convert, refuse_existing, write
from adapters.tools.extract import Extracted, extract
from adapters.tools.inspection import inspect, shown
from adapters.tools.low_rank import norm
from adapters.tools.merge import Changed, merge, with_training_adapter
from adapters.tools.opened import Opened, ToolError, open_lora
from adapters.tools.resize import Goal, resize

__all__ = [
    "Baked",
    "Changed",
    "Converted",
    "DTYPES",
    "Extracted",
    "Goal",
    "LAYOUTS",
    "Opened",
    "ToolError",
    "bake",
    "check_output",
    "convert",
    "extract",
    "inspect",
    "merge",
    "norm",
    "open_lora",
    "refuse_existing",
    "resize",
    "shown",
    "with_training_adapter",
    "write",
]
