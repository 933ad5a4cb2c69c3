"""Where compiling or cuDNN's attention fails, the work is done without, and a warning says why."""

import logging
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.models.attention_dispatch import _AttentionBackendRegistry
from root import ROOT
from torch._dynamo.backends.common import aot_autograd
from vault.models import write_qwen_image_21

from adapters.archive import read_archive
from adapters.lora import Lora
from families.loading import load_family
from families.registry import BASES, FAMILIES, undistilled
from inference import acceleration
from inference.acceleration import (
    compile_blocks,
    compile_text_encoder,
    is_compiled,
    use_attention,
    with_fallback,
)
from inference.engine import Engine
from inference.request import Request
from trainer.learning import features
from trainer.learning.loss import flow_loss
from trainer.run import train
from trainer.settings.fields import Settings

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.fixture
def hopper(use_vault: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A CPU that says that it is an H100, which cuDNN's attention refuses."""
    monkeypatch.setenv("BASE_MODEL", "z-image-turbo")
    monkeypatch.setattr(acceleration, "wanted", lambda _: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _=None: (9, 0))


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


def asked(**changes: Any) -> Request:
    values = {"prompt": "a cat", "seed": 1, "width": 64, "height": 64, "num_inference_steps": 1}
    return Request(**(values | changes))


def warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    name = acceleration.__name__
    return [r.getMessage() for r in caplog.records if r.name == name and r.levelno > logging.INFO]


def test_an_engine_without_compiler_and_cudnn_draws_all_the_same(
    hopper: None, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    compiles_with(monkeypatch, broken)
    monkeypatch.setattr(acceleration, "USUAL_RATIOS", ("1:1",))
    monkeypatch.setattr(
        acceleration,
        "_generate_usual",
        lambda family, _: acceleration.generate_once(family, 64, 64, 1.0),
    )
    engine = Engine(CPU, torch.float32)
    engine.warm_up()
    assert engine._family is not None
    assert not is_compiled(engine._family.transformer)
    no_cudnn, no_compiler = warnings(caplog)
    assert no_cudnn.startswith("cuDNN attention failed (RuntimeError: ")
    assert no_compiler == (
        "compiled blocks failed (RuntimeError: no C compiler was found); "
        "continuing without, which is slower"
    )
    monkeypatch.setattr(acceleration, "wanted", lambda _: False)
    plain = Engine(CPU, torch.float32).generate(asked())[0]
    assert engine.generate(asked())[0].tobytes() == plain.tobytes()
    assert len(warnings(caplog)) == 2


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("cuDNN error: CUDNN_STATUS_NOT_SUPPORTED"),
        FileNotFoundError(2, "No such file", "gcc"),
    ],
    ids=str,
)
def test_a_later_request_that_fails_is_drawn_with_plain_blocks(
    error: Exception,
    use_vault: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setenv("BASE_MODEL", "z-image-turbo")
    engine = Engine(CPU, torch.float32)
    engine.warm_up()
    assert engine._family is not None
    transformer = engine._family.transformer
    plain = [engine.generate(asked(width=width))[0].tobytes() for width in (64, 96)]
    compile_blocks(transformer, "eager")
    velocity = engine._family.velocity

    def refuses(latents: torch.Tensor, *rest: Any) -> torch.Tensor:
        if is_compiled(transformer) and latents.shape[-1] == 12:
            raise error
        return velocity(latents, *rest)

    monkeypatch.setattr(engine._family, "velocity", refuses)
    assert engine.generate(asked())[0].tobytes() == plain[0]
    assert is_compiled(transformer)
    assert engine.generate(asked(width=96))[0].tobytes() == plain[1]
    assert not is_compiled(transformer)
    engine.generate(asked(width=96))
    (warning,) = warnings(caplog)
    assert str(error) in warning


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory"),
        RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"),
    ],
    ids=str,
)
def test_out_of_memory_is_never_taken_for_something_else(
    error: Exception,
    use_vault: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    transformer = load_family(BASES["z-image"], CPU).transformer
    compile_blocks(transformer, "eager")
    tries = []

    def work() -> None:
        tries.append(1)
        raise error

    with pytest.raises(type(error)):
        with_fallback(transformer, work)
    assert len(tries) == 1 and is_compiled(transformer) and not warnings(caplog)


def full(graph: torch.fx.GraphModule, inputs: Any) -> Any:
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")


def test_a_compilation_that_runs_out_of_memory_is_left_out(
    use_vault: Path, caplog: pytest.LogCaptureFixture
) -> None:
    family = load_family(BASES["z-image"], CPU)
    compile_blocks(family.transformer, full)
    with_fallback(family.transformer, lambda: acceleration.generate_once(family, 64, 64, 1.0))
    assert not is_compiled(family.transformer)
    assert warnings(caplog) == [
        "compiled blocks failed (OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB);"
        " continuing without, which is slower"
    ]


def test_memory_that_plain_blocks_lack_too_is_told_as_such(
    use_vault: Path, caplog: pytest.LogCaptureFixture
) -> None:
    family = load_family(BASES["z-image"], CPU)
    compile_blocks(family.transformer, broken)

    def work() -> None:
        if not is_compiled(family.transformer):
            full(None, None)
        acceleration.generate_once(family, 64, 64, 1.0)

    with pytest.raises(torch.OutOfMemoryError):
        with_fallback(family.transformer, work)
    assert is_compiled(family.transformer) and not warnings(caplog)


def test_a_gpu_too_small_for_the_usual_sizes_serves_smaller_ones(
    hopper: None, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _=None: (8, 0))
    monkeypatch.setattr(acceleration, "_generate_usual", full)
    compiles_with(monkeypatch, "eager")
    engine = Engine(CPU, torch.float32)
    engine.warm_up()
    assert warnings(caplog) == [
        "not prepared for the usual sizes, out of memory (OutOfMemoryError: CUDA out of memory. "
        "Tried to allocate 2.00 GiB): the first request of each size takes longer, and large images"
        " may not fit"
    ]
    assert engine.generate(asked())


def test_an_error_that_plain_blocks_have_too_leaves_the_compiled_ones(
    use_vault: Path, caplog: pytest.LogCaptureFixture
) -> None:
    transformer = load_family(BASES["z-image"], CPU).transformer
    compile_blocks(transformer, "eager")
    use_attention(transformer, acceleration.HOPPER_ATTENTION)

    def work() -> None:
        raise RuntimeError("a weight is missing")

    with pytest.raises(RuntimeError, match="a weight is missing"):
        with_fallback(transformer, work)
    blocks = [each for each in transformer.modules() if each._compiled_call_impl is not None]
    assert len(blocks) == 4 and is_compiled(transformer) and not warnings(caplog)
    assert {each.processor._attention_backend for each in _attention(transformer)} == {
        acceleration.HOPPER_ATTENTION
    }


@pytest.mark.parametrize("name", ["z-image", "qwen-image"])
def test_the_attention_of_one_transformer_is_its_own(name: str, use_vault: Path) -> None:
    before = _AttentionBackendRegistry._active_backend
    one, other = (load_family(BASES[name], CPU).transformer for _ in range(2))
    use_attention(one, acceleration.HOPPER_ATTENTION)
    assert _AttentionBackendRegistry._active_backend == before
    assert {each.processor._attention_backend for each in _attention(one)} == {
        acceleration.HOPPER_ATTENTION
    }
    assert all(each.processor._attention_backend is None for each in _attention(other))


def _attention(transformer: Any) -> list[Any]:
    return [each for each in transformer.modules() if hasattr(each, "processor")]


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


def test_compiled_code_is_kept_in_the_users_cache_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "caches"))
    for own in ("", str(tmp_path / "own")):
        acceleration._prepare_compiler.cache_clear()
        monkeypatch.setenv(acceleration.CACHE_FOLDER, own)
        acceleration._prepare_compiler()
        folder = Path(own or tmp_path / "caches" / "zeroprior" / "compiled")
        assert os.environ[acceleration.CACHE_FOLDER] == str(folder) and folder.is_dir()
        assert f"compiled code is kept in {folder}" in caplog.text
    monkeypatch.setenv(acceleration.CACHE_FOLDER, str(tmp_path / "caches" / "file" / "below"))
    (tmp_path / "caches" / "file").write_text("")
    acceleration._prepare_compiler.cache_clear()
    acceleration._prepare_compiler()
    assert "compiled code is not kept for later runs" in caplog.text
    acceleration._prepare_compiler.cache_clear()


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
