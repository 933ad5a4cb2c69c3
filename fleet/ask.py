"""What the front sends to a replica, and what comes back. Does not import Ray or PyTorch."""

from dataclasses import dataclass
from typing import TypedDict

from serving.openapi import Json


@dataclass(frozen=True)
class Content:
    """A weights file by its content."""

    sha256: str
    name: str  # of the file, for messages
    config: str | None = None  # SHA-256 of its adapter_config.json


@dataclass(frozen=True)
class Ask:
    """A checked request for images."""

    inputs: Json  # as for predict.py, without files and tokens, with a seed
    weights: dict[str, Content]  # of the sources in the inputs, the first LoRA first
    files: dict[str, list[tuple[str, bytes]]]  # suffix and content of the images, by input
    streamed: bool  # steps and previews are wanted


class Event(TypedDict, total=False):
    """A part of the answer; the last one has a `status`."""

    image: int  # number of the image whose step is done
    done: int
    of: int
    preview: bytes  # a JPEG
    status: str  # succeeded or failed
    files: list[tuple[str, bytes]]  # name and content of the images
    error: str
    logs: str
    metrics: dict[str, float]
