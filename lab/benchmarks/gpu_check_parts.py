"""The parts of `lab.benchmarks.gpu_check`, each run in a process of its own."""

from collections.abc import Callable, Iterator

from lab.benchmarks.gpu_check_memory import decoding, memory, memory_qwen
from lab.benchmarks.gpu_check_product import fallbacks, packages, qwen_image, z_image
from lab.benchmarks.gpu_check_rows import Check, Row
from lab.benchmarks.gpu_check_speed import profile, quantized, rows, speed

PARTS: dict[str, Callable[[Check], Iterator[Row]]] = {
    "packages": packages,
    "profile": profile,
    "z_image": z_image,
    "memory": memory,
    "qwen_image": qwen_image,
    "fallbacks": fallbacks,
    "rows": rows,
    "quantized": quantized,
    "memory_qwen": memory_qwen,
    "decoding": decoding,
    "speed": speed,
}
FULL_ONLY = ("rows", "quantized", "memory_qwen", "decoding")


def chosen(check: Check) -> list[str]:
    """The names of the parts that are run, the most telling first."""
    return [
        name
        for name in PARTS
        if (name in check.only or not check.only) and not (check.quick and name in FULL_ONLY)
    ]
