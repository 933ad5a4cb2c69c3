"""Nothing of one request is found in another: not in pictures, weights, files or logs."""

import logging
import multiprocessing
import os
import traceback
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from cog import Secret
from hypothesis import HealthCheck, settings
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    rule,
    run_state_machine_as_test,
)
from hypothesis.strategies import integers, sampled_from
from web_server import served

from adapters.archive import Archive, BrokenArchive, read_archive, write_archive
from inference.engine import Engine
from inference.fetch.disk_cache import DiskCache
from inference.fetch.download import DownloadError
from inference.fetch.sources import Sources
from inference.inputs import GenerationInputs
from inference.request import Request
from lab.benchmarks.kill import learned, write_pictures
from trainer.data.dataset import DatasetError
from trainer.run import train_from_inputs
from trainer.settings.inputs import TrainingInputs

CPU = torch.device("cpu")
BASES = ("miniature-turbo", "miniature")
# Trainings that differ in data, word, previews and what they leave behind.
TRAININGS: dict[str, dict[str, Any]] = {
    "cat": {"placeholder_token": "<cat>", "seed": 1, "checkpoint_every": 1},
    "dog": {"placeholder_token": "<dog>", "seed": 2, "base_model": "miniature"},
    "plain": {
        "train_placeholder_token": False,
        "trigger_word": "a thing",
        "seed": 3,
        "sample_prompts": "a red circle",
    },
}
SMALL: dict[str, Any] = {
    "steps": 2,
    "rank": 2,
    "batch_size": 1,
    "resolution": "64",
    "validation_every": 0,
    "sample_prompts": "",
    "preserve": "off",
}
LEFT = {  # all that each of them leaves in its folder, besides `ALWAYS`
    "cat": set(),
    "dog": set(),
    "plain": {"samples/sheet.png", "samples/step-000002/00.png"},
}
RECORDS = {"run.json", "run.lock", "events.jsonl", "log.txt", "record.json"}
ALWAYS = (
    RECORDS
    | {"weights.zip", "report.html"}
    | {f"checkpoints/step-00000{step}.{kind}" for step in (1, 2) for kind in ("safetensors", "zip")}
)

DENIED = (403, {}, b"not yours")


class Cancelled(BaseException):
    """What the runtime throws into a request that is cancelled."""


def train(name: str) -> Path:
    """A training through the face's inputs, in the working folder."""
    inputs = {"base_model": "miniature-turbo", **SMALL, **TRAININGS[name]}
    return train_from_inputs(
        TrainingInputs(dataset=write_pictures(Path("imgs.zip"), name), **inputs)
    )


def train_alone(name: str, folder: str) -> None:
    os.chdir(folder)
    os.environ.pop("MODEL_VAULT", None)
    torch.set_num_threads(1)
    train(name)


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Archive]:
    """Each training's weights, from a process that has done nothing else."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["trainer.run"])
    archives = {}
    for name in TRAININGS:
        folder = tmp_path_factory.mktemp(name)
        process = context.Process(target=train_alone, args=(name, str(folder)))
        process.start()
        process.join()
        archives[name] = read_archive(folder / "outputs" / "latest" / "weights.zip")
    return archives


def machine(alone: dict[str, Archive], broken: Path) -> type[RuleBasedStateMachine]:
    """Requests in any order, to one engine and in one working folder."""

    @cache
    def drawn_alone(prompt: str, base: str, weights: str | None, scale: float) -> bytes:
        archive = alone[weights] if weights else None
        return draw(Engine(CPU, torch.float32), prompt, base, archive, scale)

    def draw(
        engine: Engine, prompt: str, base: str, archive: Archive | None, scale: float
    ) -> bytes:
        size: dict[str, int] = {"width": 32, "height": 32, "num_inference_steps": 1}
        request = Request(prompt=prompt, seed=4, lora_scale=scale, **size)
        return engine.generate(request, archive, base)[0].tobytes()

    class Requests(RuleBasedStateMachine):
        @initialize()
        def start(self) -> None:
            self.engine = Engine(CPU, torch.float32)
            self.runs: dict[Path, dict[str, bytes]] = {}  # the files of every training's folder

        @rule(
            prompt=sampled_from(["a red circle", "a photo of <cat> and <dog>"]),
            base=sampled_from(BASES),
            weights=sampled_from([None, *TRAININGS]),
            scale=sampled_from([1.0, -0.5, 0.0]),
        )
        def predict(self, prompt: str, base: str, weights: str | None, scale: float) -> None:
            archive = alone[weights] if weights else None
            got = draw(self.engine, prompt, base, archive, scale)
            assert got == drawn_alone(prompt, base, weights, scale)

        @rule(base=sampled_from(BASES), weights=sampled_from(list(TRAININGS)), call=integers(0, 90))
        def predict_and_cancel(self, base: str, weights: str, call: int) -> None:
            """In the middle of the weights, of the text encoder, or of the transformer."""
            left = iter(range(call))

            def cancel(*_: Any) -> None:
                if next(left, None) is None:
                    raise Cancelled

            hook = torch.nn.modules.module.register_module_forward_pre_hook(cancel)
            try:
                draw(self.engine, f"a photo of <{weights}>", base, alone[weights], 1.0)
            except Cancelled:
                pass
            finally:
                hook.remove()

        @rule()
        def predict_with_broken_weights(self) -> None:
            with pytest.raises(BrokenArchive):
                self.engine.read(broken)

        @rule(name=sampled_from(list(TRAININGS)))
        def train(self, name: str) -> None:
            weights = train(name)
            assert same(read_archive(weights), alone[name])
            assert weights.parent not in self.runs
            self.runs[weights.parent] = files_in(weights.parent)
            assert self.runs[weights.parent].keys() == ALWAYS | LEFT[name]
            assert Path("outputs/latest").samefile(weights.parent)

        @rule()
        def train_on_a_broken_dataset(self) -> None:
            Path("imgs.zip").write_bytes(b"PK\x03\x04")
            with pytest.raises(DatasetError):
                train_from_inputs(TrainingInputs(dataset=Path("imgs.zip"), **SMALL))

        @invariant()
        def no_training_touches_the_folder_of_another(self) -> None:
            assert {folder: files_in(folder) for folder in self.runs} == self.runs

    return Requests


def files_in(folder: Path) -> dict[str, bytes]:
    files = [file for file in folder.rglob("*") if file.is_file()]
    return {file.relative_to(folder).as_posix(): file.read_bytes() for file in files}


def same(one: Archive, other: Archive) -> bool:
    ours, theirs = learned(one), learned(other)
    return ours.keys() == theirs.keys() and all(torch.equal(ours[k], theirs[k]) for k in ours)


@pytest.mark.parametrize("sequences", [2, pytest.param(8, marks=pytest.mark.slow)])
def test_no_output_depends_on_an_earlier_request(
    sequences: int,
    alone: dict[str, Archive],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("MODEL_VAULT", raising=False)
    monkeypatch.chdir(tmp_path)
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(temporary))
    broken = write_archive(alone["cat"], tmp_path / "broken.zip")
    broken.write_bytes(broken.read_bytes()[:-100])
    run_state_machine_as_test(
        machine(alone, broken),
        settings=settings(
            max_examples=sequences,
            stateful_step_count=12,
            deadline=None,
            derandomize=True,
            suppress_health_check=list(HealthCheck),
        ),
    )
    assert list(temporary.iterdir()) == []


def test_a_token_that_opens_a_repository_is_found_nowhere_afterwards(
    alone: dict[str, Archive],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    capfd: pytest.CaptureFixture[str],
) -> None:
    """Where the request is drawn, where it is refused, and in every file that either leaves."""
    caplog.set_level(logging.DEBUG)
    monkeypatch.delenv("MODEL_VAULT", raising=False)
    monkeypatch.setenv("BASE_MODEL", "miniature-turbo")
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    token, said = "hf_" + "s3cret" * 5, []
    weights = write_archive(alone["cat"], tmp_path / "cat.zip").read_bytes()
    with served() as web:
        web.pages["huggingface.co/a/b/resolve/main/w.zip"] = lambda headers: (
            (200, {}, weights) if headers.get("authorization") == f"Bearer {token}" else DENIED
        )
        sources = Sources(web.downloader(most=1 << 30), DiskCache(tmp_path / "cache"))
        engine = Engine(CPU, torch.float32, sources)

        def ask(source: str, format: str) -> None:
            inputs = {"prompt": "a photo of <cat>", "width": 32, "height": 32, "seed": 1}
            inputs |= {"num_inference_steps": 1, "output_format": format}
            engine.predict(
                GenerationInputs(lora_weights=source, **inputs),
                hf_api_token=Secret(token),
                output_dir=None,
            )

        for format in ("png", "jpg", "webp"):
            ask("hf:a/b/w.zip", format)
        assert any(token in headers.get("authorization", "") for _, headers in web.asked)
        for source in ("hf:a/b/other.zip", "https://weights.example/w.zip"):
            with pytest.raises(DownloadError) as error:
                ask(source, "png")
            said.append("".join(traceback.format_exception(error.value)))
    said += [caplog.text, *capfd.readouterr()]
    assert all(token not in text for text in said)
    files = [file for file in tmp_path.rglob("*") if file.is_file()]
    assert {file.suffix for file in files} >= {".png", ".jpg", ".webp"}
    assert all(token.encode() not in file.read_bytes() for file in files)
    assert all(token not in str(file) for file in files)
