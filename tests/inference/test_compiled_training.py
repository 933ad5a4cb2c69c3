"""A training whose blocks are compiled, or cannot be."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from failing_compilers import CPU, broken, compiles_with, full, warnings
from root import ROOT
from torch._dynamo.backends.common import aot_autograd
from vault.models import write_qwen_image_21

from adapters.archive import read_archive
from adapters.lora import Lora
from families.loading import load_family
from families.registry import BASES, FAMILIES, undistilled
from inference.acceleration import (
    compile_blocks,
    is_compiled,
    with_fallback,
)
from trainer.learning.loss import flow_loss
from trainer.run import train
from trainer.settings.fields import Settings

pytestmark = pytest.mark.usefixtures("fresh_compiler")


def backward_broken(graph: torch.fx.GraphModule, inputs: Any) -> Any:
    backend = aot_autograd(fw_compiler=lambda graph, _: graph.forward, bw_compiler=broken)
    return backend(graph, inputs)


@pytest.mark.parametrize(
    ("backend", "validation_every"),
    [
        (broken, 0),
        pytest.param(broken, 2, marks=pytest.mark.slow),
        pytest.param(full, 0, marks=pytest.mark.slow),
        pytest.param(backward_broken, 0, marks=pytest.mark.slow),
        pytest.param(backward_broken, 2, marks=pytest.mark.slow),
    ],
)
def test_a_training_whose_blocks_cannot_be_compiled_trains_plain_ones(
    backend: Any,
    validation_every: int,
    small: Callable[..., Settings],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    common = {"validation_every": validation_every, "gradient_accumulation": 2, "steps": 2}
    plain = read_archive(train(small(**common, output_dir=tmp_path / "plain")))
    compiles_with(monkeypatch, backend)
    monkeypatch.setenv("COMPILE", "1")
    found = read_archive(train(small(**common, output_dir=tmp_path / "compiled")))
    said = warnings(caplog)  # of the text encoder and the transformer
    why = "CUDA out of memory" if backend is full else "no C compiler was found"
    assert 1 <= len(said) <= 2 and all(why in warning for warning in said)
    for layer, pair in plain.factors.items():
        assert all(map(torch.equal, pair, found.factors[layer])), layer


@pytest.mark.slow
@pytest.mark.parametrize("base", [undistilled(each).name for each in FAMILIES.values()])
def test_inductor_compiles_a_step_of_every_family(
    base: str,
    use_vault: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """The loss and the LoRA's gradients equal those of plain blocks, up to rounding."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    if base == "qwen-image-2.1":  # not in the vault of all tests
        monkeypatch.setenv("MODEL_VAULT", str(write_qwen_image_21(tmp_path / "vault")))
    family = load_family(BASES[base], CPU, torch.float32)
    lora = Lora(family.transformer, family.lora_targets(), 4, seed=0)
    random = torch.Generator().manual_seed(1)
    latents, noise = torch.randn(2, 1, family.latent_channels, 8, 8, generator=random)
    text = family.encode_prompts(["a cup of coffee"])

    def step() -> tuple[torch.Tensor, list[torch.Tensor]]:
        loss = flow_loss(family, latents, noise, torch.tensor([0.5]), text)
        loss.backward()
        found = [layer.up.grad.clone() for layer in lora.layers.values()]
        for each in lora.parameters():
            each.grad = None
        return loss.detach(), found

    plain, gradients = step()
    compile_blocks(family.transformer)
    compiled, same = with_fallback(family.transformer, step)
    assert is_compiled(family.transformer) and not warnings(caplog)
    torch.testing.assert_close(compiled, plain)
    for one, other in zip(gradients, same, strict=True):
        assert (one - other).norm() < 1e-4 * one.norm()


@pytest.mark.slow
@pytest.mark.parametrize("compiler", ["g++", "/nonexistent/g++"])
def test_the_miniature_is_trained_and_drawn_with_and_without_a_compiler(
    compiler: str, tmp_path: Path
) -> None:
    """With Inductor itself, in processes of their own and an empty cache."""
    config = tmp_path / "run.yaml"
    text = (ROOT / "configs" / "miniature.yaml").read_text()
    config.write_text(text)
    env = os.environ | {
        "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache"),
        "COMPILE": "1",
        "CXX": compiler,
        "PYTHONPATH": str(ROOT),
    }
    script = (
        "import torch\n"
        "from dataclasses import replace\n"
        "from inference import acceleration\n"
        "from inference.engine import Engine\n"
        "from inference.request import Request\n"
        "from inference.console import log_to_console\n"
        "from trainer.settings.config import read_config\n"
        "from trainer.run import train\n"
        "log_to_console()\n"
        f"settings = read_config({str(config)!r}, output_dir={str(tmp_path / 'out')!r})\n"
        "weights = train(settings.replace(steps=3, sample_every=0))\n"
        "acceleration.wanted = lambda _: True\n"
        "torch.cuda.get_device_capability = lambda _: (8, 0)\n"
        "engine = Engine()\n"
        "engine.warm_up(weights)\n"
        "engine.generate(Request(prompt='a photo of <zwx>', num_inference_steps=1))\n"
        "print('compiled:', acceleration.is_compiled(engine._family.transformer))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, env=env, capture_output=True, text=True,
        timeout=900,
    )  # fmt: skip
    said = done.stdout + done.stderr
    assert done.returncode == 0, said
    works = compiler == "g++"
    assert f"compiled: {works}" in said
    # Of the text encoder and the transformer in training, and of the engine.
    assert said.count("compiled blocks failed") == (0 if works else 3)
