"""A training on a GPU chooses how it uses memory; the GPU is pretended, the counting is real."""

import logging
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from root import ROOT

from families import loading
from families.family import Family
from families.loading import default_device, default_dtype, load_family
from families.memory import RESERVE, free_and_total
from families.out_of_memory import is_out_of_memory
from trainer.memory import fitting
from trainer.memory.fitting import fit
from trainer.memory.plan import Choice, Mode
from trainer.memory.speed import GPUS
from trainer.memory.step_cost import NOTHING
from trainer.settings.fields import Settings, resolve
from trainer.settings.inputs import TrainingInputs

CAPTIONS = ["a photo of <zwx>", "a photo of <zwx> on a table beside a window"]
# Those of the documents and the docstrings, and some in a part of the blocks. Counting at the
# published sizes takes seconds, so all but the first of each are slow tests.
TARGETS = {
    "z-image-turbo": ["layers.1*.attention.*", "auto", "all", "attention.to_q", "attention"]
    + ["feed_forward", "layers.2?.attention.*", "noise_refiner.*"],
    "qwen-image": ["auto", "all", "attn.to_q, attn.to_k", "transformer_blocks.1*.attn.*"]
    + ["attention", "feed_forward", "transformer_blocks.2?.attn.*", "img_in"],
}


@pytest.fixture
def card(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[float], None]]:
    """Pretends a GPU and a CPU with so many free GB; quantizations are all installed."""

    def has(gigabytes: float, cpu: float = 200) -> None:
        free = round(gigabytes * 1e9)
        host = round(cpu * 1e9)
        monkeypatch.setattr(fitting, "free_memory", lambda at: host if at.type == "cpu" else free)

    yield has


def on_gpu(settings: Settings, use_vault: Path, monkeypatch: pytest.MonkeyPatch) -> Family:
    """The family of the vault's small model, which says that it is on a GPU; it is published to be
    of the published size."""
    family = load_family(settings.base, torch.device("cpu"), torch.bfloat16)
    _ = family.prompts
    family.device = torch.device("cuda")
    monkeypatch.delenv("MODEL_VAULT")
    return family


def chosen(
    settings: Settings, family: Family, card: Callable[[float], None], gigabytes: float
) -> Choice:
    card(gigabytes)
    return fit(settings, family, CAPTIONS)


def settings_of(name: str, **changes: Any) -> Settings:
    return resolve(
        TrainingInputs(**{"dataset": "unread.zip", "base_model": name, "seed": 1} | changes)
    )


@pytest.mark.parametrize(
    ("name", "targets"),
    [
        pytest.param(name, each, marks=[pytest.mark.slow] if place else [])
        for name, all in TARGETS.items()
        for place, each in enumerate(all)
    ],
)
def test_every_card_gets_a_mode_for_every_lora_targets(
    name: str,
    targets: str,
    use_vault: Path,
    card: Callable[[float], None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    settings = settings_of(name, lora_targets=targets, train_placeholder_token=False)
    family = on_gpu(settings, use_vault, monkeypatch)
    counted = fitting.figures_of(settings, 40, torch.bfloat16)
    monkeypatch.setattr(fitting, "figures_of", lambda *_: counted)  # the same for every card
    for kind in GPUS.values():
        choice = chosen(settings, family, card, kind.memory)
        assert choice.fits and choice.peak <= kind.memory * 1e9 * (1 - RESERVE)


@pytest.mark.slow
def test_a_small_card_gets_a_leaner_mode_than_a_large_one(
    use_vault: Path, card: Callable[[float], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = settings_of("z-image-turbo")
    family = on_gpu(settings, use_vault, monkeypatch)
    assert chosen(settings, family, card, 80).mode == Mode()
    assert chosen(settings, family, card, 24).mode == Mode("int8", 19 / 30)


@pytest.mark.parametrize(("gigabytes", "said"), [(24, False), (18.9, True)])
def test_a_mode_without_room_for_a_preview_says_so_before_the_first_step(
    gigabytes: float,
    said: bool,
    use_vault: Path,
    card: Callable[[float], None],
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    caplog.set_level(logging.INFO)
    settings = settings_of(
        "z-image-turbo", sample_prompts="a <zwx>", quantize="int8", low_memory=False
    )
    family = on_gpu(settings, use_vault, monkeypatch)
    choice = chosen(settings, family, card, gigabytes)
    assert choice.fits and bool(choice.no_previews) == said
    line = f"no preview images during training: {choice.no_previews}"
    assert (line in caplog.messages) == said


@pytest.mark.slow
def test_previews_that_are_asked_for_get_a_mode_that_has_room_for_them(
    use_vault: Path, card: Callable[[float], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    common: dict[str, Any] = {"quantize": "int8", "sample_prompts": "a <zwx>"}
    one, two = (settings_of("z-image-turbo", **common, sample_every=n) for n in (0, 100))
    family = on_gpu(one, use_vault, monkeypatch)
    assert chosen(one, family, card, 18.9).mode == Mode("int8", 28 / 30)
    leaner = chosen(two, family, card, 18.9)
    assert (leaner.mode, leaner.no_previews) == (Mode("int8", 23 / 30, offload=True), "")


@pytest.mark.slow
def test_a_preview_is_counted_only_where_one_is_wanted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MODEL_VAULT", raising=False)
    plain, shown = (
        fitting.figures_of(settings_of("z-image-turbo", **each), 40, torch.bfloat16)
        for each in (
            {},
            {"sample_prompts": "a <zwx>", "sample_options": {"width": 512, "height": 512}},
        )
    )
    assert plain.preview == NOTHING and plain.previews(Mode()) == 0
    weights = shown.weights("none") + shown.text_weights("none") + 4 * shown.vae_weights
    assert 0 < shown.preview.bytes < 1e9
    assert shown.previews(Mode()) == weights + shown.trained() + shown.preview.bytes


@pytest.mark.slow
def test_small_images_share_the_encoders_batches() -> None:
    """Four images of 512 pixels are encoded at once, and many short captions."""
    one, four = (
        fitting.figures_of(settings_of("z-image-turbo", resolution=each), 128, torch.bfloat16)
        for each in ("1024", "512")
    )
    assert four.image.bytes == pytest.approx(one.image.bytes, rel=0.05)
    tokens = 32 * 128  # what the text encoder reads at once
    assert four.caption.bytes > tokens * 9728 * 2  # one activation of its widest layer


# Free memory.


def test_a_containers_limit_less_what_it_uses_is_free(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("families.memory._CGROUP", tmp_path)
    (tmp_path / "own").mkdir()
    (tmp_path / "process").write_text("0::/own\n")
    monkeypatch.setattr("families.memory._OF_PROCESS", tmp_path / "process")
    machine = free_and_total(torch.device("cpu"))
    for folder, limit in ((tmp_path, "max"), (tmp_path / "own", str(8 << 20))):
        (folder / "memory.max").write_text(limit)
        (folder / "memory.current").write_text(str(7 << 20))
        (folder / "memory.stat").write_text(f"anon 1\ninactive_file {2 << 20}\n")
    assert free_and_total(torch.device("cpu")) == (3 << 20, 8 << 20)
    assert machine[0] > 8 << 20


@pytest.mark.parametrize(
    ("error", "is_one"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"), True),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate"), True),
        (RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"), True),
        (RuntimeError("cuDNN error: CUDNN_STATUS_NOT_SUPPORTED"), False),
        (ValueError("out of memory is what this prompt is about"), False),
    ],
    ids=str,
)
def test_out_of_memory_is_told_from_other_errors(error: Exception, is_one: bool) -> None:
    assert is_out_of_memory(error) == is_one
    outer = RuntimeError("backend='inductor' raised")
    outer.__cause__ = error
    assert is_out_of_memory(outer) == is_one


@pytest.mark.slow
def test_processes_with_unlike_cards_take_the_same_mode(tmp_path: Path, vault: Path) -> None:
    script = tmp_path / "choose.py"
    script.write_text(
        "import os, torch\n"
        "from families.loading import default_device, load_family\n"
        "from trainer.memory.fitting import fit\n"
        "from trainer.settings import TrainingInputs, resolve\n"
        "free = (80, 24)[int(os.environ['RANK'])] * 10**9\n"
        "torch.cuda.mem_get_info = lambda _: (free, free)\n"
        "settings = resolve(TrainingInputs(dataset='x', base_model='z-image-turbo', seed=1))\n"
        "family = load_family(settings.base, torch.device('cpu'), torch.bfloat16)\n"
        "_ = family.prompts\n"
        "family.device = torch.device('cuda')\n"
        "del os.environ['MODEL_VAULT']\n"
        "mode = fit(settings, family, ['a photo']).mode.label\n"
        "print(f'mode: {mode}\\n', end='')  # in one write, since both processes share the output\n"
    )
    launch = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2")
    done = subprocess.run(
        [sys.executable, *launch, str(script)],
        env={"PATH": "/usr/bin:/bin", "PYTHONPATH": str(ROOT), "MODEL_VAULT": str(vault)},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    modes = [line for line in done.stdout.splitlines() if line.startswith("mode:")]
    assert modes == ["mode: int8 + 63% checkpointing"] * 2


@pytest.mark.parametrize(
    ("module", "own"),
    [("families", None), ("families", "backend:native"), ("adapters.lora", None)],
)
def test_cudas_allocator_gets_growing_segments_before_it_is_made(
    module: str, own: str | None
) -> None:
    """However a program begins; a choice of its own is kept."""
    env = {"PYTHONPATH": str(ROOT), "PATH": "/usr/bin:/bin"}
    if own:
        env["PYTORCH_CUDA_ALLOC_CONF"] = own
    script = f"import os, {module}; print(os.environ['PYTORCH_CUDA_ALLOC_CONF'])"
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, env=env, capture_output=True, text=True
    )
    assert done.stdout.strip() == (own or "expandable_segments:True"), done.stderr


def test_a_gpu_multiplies_float32_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    torch.backends.cuda.matmul.allow_tf32 = True
    assert default_device().type == "cuda"
    assert not torch.backends.cuda.matmul.allow_tf32


@pytest.mark.parametrize("has_it", [True, False])
def test_a_gpu_without_bfloat16_computes_in_float32_and_says_what_it_costs(
    has_it: bool, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.delenv("DTYPE", raising=False)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: has_it)
    loading._has_bfloat16.cache_clear()
    found = default_dtype(torch.device("cuda"))
    assert default_dtype(torch.device("cuda")) == found  # with one warning
    loading._has_bfloat16.cache_clear()
    assert found == (torch.bfloat16 if has_it else torch.float32)
    assert ["twice the memory" in line for line in caplog.messages] == ([] if has_it else [True])
    monkeypatch.setenv("DTYPE", "bfloat16")  # emulated, where a user wants it
    assert default_dtype(torch.device("cuda")) == torch.bfloat16
