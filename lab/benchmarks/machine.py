"""What a figure was measured on, in one line."""

import os
import platform
from importlib.metadata import version
from pathlib import Path

import torch

_LIBRARIES = ("torch", "diffusers", "transformers", "peft")


def machine() -> str:
    """The processor or GPU, threads, and the versions of what does the work."""
    libraries = ", ".join(f"{name} {version(name)}" for name in _LIBRARIES)
    return f"{_device()}, Python {platform.python_version()}, {libraries}"


def _device() -> str:
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    name = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        lines = cpuinfo.read_text().splitlines()
        name = next((x.split(": ")[1] for x in lines if x.startswith("model name")), name)
    return f"{name}, {torch.get_num_threads()} of {os.cpu_count()} threads"
