"""Where compiling or cuDNN's attention fails, the work is done without, and a warning says why."""

import logging
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.models.attention_dispatch import _AttentionBackendRegistry
from failing_compilers import CPU, broken, compiles_with, full, warnings

from families.loading import load_family
from families.registry import BASES
from inference import acceleration
from inference.acceleration import (
    compile_blocks,
    is_compiled,
    use_attention,
    with_fallback,
)
from inference.engine import Engine
from inference.request import Request

pytestmark = pytest.mark.usefixtures("fresh_compiler")


@pytest.fixture
def hopper(use_vault: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A CPU that says that it is an H100, which cuDNN's attention refuses."""
    monkeypatch.setenv("BASE_MODEL", "z-image-turbo")
    monkeypatch.setattr(acceleration, "wanted", lambda _: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _=None: (9, 0))


def asked(**changes: Any) -> Request:
    values = {"prompt": "a cat", "seed": 1, "width": 64, "height": 64, "num_inference_steps": 1}
    return Request(**(values | changes))


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
