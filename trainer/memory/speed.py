"""How long a step takes: its arithmetic over what a card does of it."""

from dataclasses import dataclass

UTILISATION = 0.35  # of a card's peak, assumed; loops that wait for the host reach far less
HOST_LINK_USE = 0.8  # of the link's rate, for weights that wait in host memory


@dataclass(frozen=True)
class Card:
    """A GPU as its data sheet describes it."""

    memory: float  # GB as sold
    tflops: float  # bfloat16, dense, accumulated in float32
    host_link: float  # GB/s towards the card


# NVIDIA's data sheets; the link is PCIe 4.0 x16 or 5.0 x16.
CARDS: dict[str, Card] = {
    "H200": Card(141, 989, 63),
    "H100": Card(80, 989, 63),
    "A100": Card(80, 312, 31.5),
    "L40S": Card(48, 362, 31.5),
    "RTX 5090": Card(32, 209.5, 63),
    "RTX 4090": Card(24, 165.2, 31.5),
}


def step_seconds(card: Card, flops: float, fetched_bytes: float = 0.0) -> float:
    """Seconds of one step; fetching weights from host memory is not overlapped."""
    return flops / (card.tflops * 1e12 * UTILISATION) + fetched_bytes / (
        card.host_link * 1e9 * HOST_LINK_USE
    )
