"""The tools for LoRA files (`python -m adapters`)."""

from adapters.tools.bake import Baked, bake, check_output
from adapters.tools.convert import Converted, convert, write
from adapters.tools.extract import Extracted, extract
from adapters.tools.figures import norms_figure, result_figure
from adapters.tools.inspection import by_block, inspect, shown
from adapters.tools.low_rank import norm
from adapters.tools.merge import Changed, merge, with_training_adapter
from adapters.tools.opened import Opened, ToolError, open_lora
from adapters.tools.outputs import check_files
from adapters.tools.resize import Goal, resize

__all__ = [
    "Baked",
    "Changed",
    "Converted",
    "Extracted",
    "Goal",
    "Opened",
    "ToolError",
    "bake",
    "by_block",
    "check_files",
    "check_output",
    "convert",
    "extract",
    "inspect",
    "merge",
    "norm",
    "norms_figure",
    "open_lora",
    "resize",
    "result_figure",
    "shown",
    "with_training_adapter",
    "write",
]
