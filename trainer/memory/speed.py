"""Estimates the time of a step from its FLOPs and a GPU's data sheet."""

from dataclasses import dataclass

UTILIZATION = 0.35  # of a GPU's peak, assumed; much less if the GPU waits for the CPU
HOST_LINK_USE = 0.8  # of the link's rate, for offloaded weights


@dataclass(frozen=True)
class Gpu:
    """A GPU by its data sheet."""

    memory: float  # GB, nominal
    tflops: float  # bfloat16, dense, accumulated in float32
    host_link: float  # GB/s to the GPU


# NVIDIA's data sheets; the link is PCIe 4.0 x16 or 5.0 x16.
GPUS: dict[str, Gpu] = {
    "H200": Gpu(141, 989, 63),
    "H100": Gpu(80, 989, 63),
    "A100": Gpu(80, 312, 31.5),
    "L40S": Gpu(48, 362, 31.5),
    "RTX 5090": Gpu(32, 209.5, 63),
    "RTX 4090": Gpu(24, 165.2, 31.5),
}


def step_seconds(gpu: Gpu, flops: float, fetched_bytes: float = 0.0) -> float:
    """Seconds of one step; copies from CPU memory do not overlap with computation."""
    return flops / (gpu.tflops * 1e12 * UTILIZATION) + fetched_bytes / (
        gpu.host_link * 1e9 * HOST_LINK_USE
    )
