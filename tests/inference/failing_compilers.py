"""Compilers that fail, in the place of Inductor."""

import logging
from typing import Any

import pytest
import torch

from inference import acceleration
from inference.acceleration import (
    compile_blocks,
    compile_text_encoder,
)
from trainer.learning import features

CPU = torch.device("cpu")


def broken(graph: torch.fx.GraphModule, inputs: Any) -> Any:
    raise RuntimeError("no C compiler was found")


def compiles_with(monkeypatch: pytest.MonkeyPatch, backend: Any) -> None:
    monkeypatch.setattr(
        acceleration,
        "compile_blocks",
        lambda transformer, **options: compile_blocks(transformer, backend, **options),
    )
    monkeypatch.setattr(
        features, "compile_text_encoder", lambda family: compile_text_encoder(family, backend)
    )


def warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    name = acceleration.__name__
    return [r.getMessage() for r in caplog.records if r.name == name and r.levelno > logging.INFO]


def full(graph: torch.fx.GraphModule, inputs: Any) -> Any:
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
