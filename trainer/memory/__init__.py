"""Estimates memory and time of a run, and chooses a mode that fits into memory."""

from trainer.memory.fitting import RanOut, TooLarge, fit, running_out
from trainer.memory.freeing import free_memory, memory_freed
from trainer.memory.plan_table import describe_plan, plan_data
from trainer.memory.plans import Plans

__all__ = [
    "Plans",
    "RanOut",
    "TooLarge",
    "fit",
    "free_memory",
    "memory_freed",
    "describe_plan",
    "plan_data",
    "running_out",
]
