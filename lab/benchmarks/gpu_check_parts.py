"""The parts of `lab.benchmarks.gpu_check`, each run in a process of its own."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from lab.benchmarks.gpu_check_lora import lora
from lab.benchmarks.gpu_check_memory import decoding, memory, memory_qwen
from lab.benchmarks.gpu_check_product import fallbacks, packages, qwen_image, server, z_image
from lab.benchmarks.gpu_check_quantized import images, quantized
from lab.benchmarks.gpu_check_rows import Check, Row
from lab.benchmarks.gpu_check_speed import peers, profile, rows, speed, text_encoder


@dataclass(frozen=True)
class Part:
    """One part, and the seconds that are reserved for it on an H100; 0: not run."""

    run: Callable[[Check], Iterator[Row]]
    full: int
    quick: int = 0

    @property
    def title(self) -> str:
        """What it does, in one line."""
        return str(self.run.__doc__).splitlines()[0]


# In the order of importance. The seconds add up to 580 and 230: with the start, 10 and 4 minutes.
PARTS = {
    "packages": Part(packages, 10, 10),
    "profile": Part(profile, 65, 55),
    "lora": Part(lora, 30, 20),
    "z_image": Part(z_image, 145, 50),
    "images": Part(images, 40, 30),
    "memory": Part(memory, 60, 20),
    "peers": Part(peers, 60),
    "qwen_image": Part(qwen_image, 40, 35),
    "fallbacks": Part(fallbacks, 15, 10),
    "text_encoder": Part(text_encoder, 20),
    "server": Part(server, 25),
    "rows": Part(rows, 15),
    "quantized": Part(quantized, 20),
    "memory_qwen": Part(memory_qwen, 15),
    "decoding": Part(decoding, 10),
    "speed": Part(speed, 10),
}


def chosen(check: Check) -> dict[str, int]:
    """The parts that are run and the seconds reserved for each, the most important first.

    A part that was asked for by name is run with --quick too.
    """
    reserved = {name: (part.quick if check.quick else part.full) for name, part in PARTS.items()}
    if check.only:
        return {name: reserved[name] or PARTS[name].full for name in PARTS if name in check.only}
    return {name: seconds for name, seconds in reserved.items() if seconds}
