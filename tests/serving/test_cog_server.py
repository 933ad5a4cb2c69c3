"""A stranger with HTTP alone: a dataset becomes weights, weights and a prompt become pictures.

One real server per mode, on a copy of the code, over a small random model.
"""

import base64
import io
import json
import os
import re
import shutil
import time
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from cog_server import PREFER_ASYNC, CogServer, Webhooks, copy_of_the_code
from foreign_files import Foreign
from PIL import Image
from safetensors.torch import load, load_file, save

ROUTES = {"train": "/trainings", "predict": "/predictions"}
SMALL = {
    "rank": 2,
    "steps": 3,
    "batch_size": 1,
    "resolution": "64",
    "seed": 7,
    "sample_prompts": "",
    "preserve": "off",
}
PROMPT = {"prompt": "a photo of <zwx>", "num_inference_steps": 2, "seed": 7, "output_format": "png"}


@dataclass(frozen=True)
class Training:
    """A training through HTTP."""

    dataset: str  # the data URL that went in
    report: dict[str, Any]  # the last webhook
    saved: Path  # a copy of what was saved in the working folder

    @property
    def weights(self) -> str:
        """The data URL that came out."""
        return self.report["output"]["weights"]


@pytest.fixture(scope="module")
def code(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The servers' working folder."""
    folder = copy_of_the_code(tmp_path_factory.mktemp("served"))
    yield folder
    shutil.rmtree(folder)


@pytest.fixture(scope="module")
def env(miniature_vault: Path, code: Path, photos: Path) -> dict[str, str]:
    return {
        "MODEL_VAULT": str(miniature_vault),
        "BASE_MODEL": "miniature-turbo",
        "HF_HUB_OFFLINE": "1",
        "LOG_PROMPT_IDS": "1",
        "OMP_NUM_THREADS": "1",
        "ZEROPRIOR_FILES": os.pathsep.join([str(photos.parent), "shelf"]),
    }


@pytest.fixture(scope="module")
def trainer(code: Path, env: dict[str, str]) -> Iterator[CogServer]:
    with CogServer("train", env, code) as server:
        yield server


@pytest.fixture(scope="module")
def predictor(code: Path, env: dict[str, str]) -> Iterator[CogServer]:
    with CogServer("predict", env, code) as server:
        yield server


@pytest.fixture(scope="module")
def training(
    trainer: CogServer, code: Path, photos: Path, tmp_path_factory: pytest.TempPathFactory
) -> Training:
    dataset = data_url("application/zip", photos.read_bytes())
    foreign = Foreign(code / "outputs", tmp_path_factory.mktemp("photos"))
    report = run(trainer, {"dataset": dataset, **SMALL})
    assert report["status"] == "succeeded", report
    foreign.assert_untouched()
    latest = code / "outputs" / "latest" / "weights.zip"
    saved = shutil.copy(latest, tmp_path_factory.mktemp("saved"))
    return Training(dataset, report, Path(saved))


def run(server: CogServer, inputs: dict[str, Any]) -> dict[str, Any]:
    """One run from start to end, and what the server reports of it."""
    with Webhooks() as hooks:
        server.wait_idle()
        request = {"input": inputs, "webhook": hooks.url}
        reply = server.post(ROUTES[server.mode], request, PREFER_ASYNC)
        assert reply.status_code == 202, reply.text
        return hooks.finished()


def data_url(mime: str, content: bytes) -> str:
    return f"data:{mime};base64,{base64.b64encode(content).decode()}"


def content_of(url: str) -> bytes:
    assert url.startswith("data:"), url[:80]
    return base64.b64decode(url.split(",", 1)[1])


def picture(url: str) -> Image.Image:
    image = Image.open(io.BytesIO(content_of(url)))
    image.load()
    return image


def files_in(folder: Path) -> dict[str, bytes]:
    files = [file for file in folder.rglob("*") if file.is_file()]
    return {file.relative_to(folder).as_posix(): file.read_bytes() for file in files}


def meta_of(weights: str) -> dict[str, Any]:
    with zipfile.ZipFile(io.BytesIO(content_of(weights))) as archive:
        return json.loads(archive.read("meta.json"))


def tensors_of(weights: str) -> dict[str, torch.Tensor]:
    """LoRA and placeholder of a weights.zip."""
    with zipfile.ZipFile(io.BytesIO(content_of(weights))) as archive:
        files = [name for name in archive.namelist() if name.endswith(".safetensors")]
        return {key: value for name in files for key, value in load(archive.read(name)).items()}


# ---- Training ------------------------------------------------------------------------------------


def test_a_zip_of_pictures_becomes_weights(training: Training) -> None:
    with zipfile.ZipFile(io.BytesIO(content_of(training.weights))) as archive:
        assert set(archive.namelist()) == {
            "lora/lora_weights.safetensors",
            "embeddings/placeholder.safetensors",
            "comfyui/README.txt",
            "comfyui/zwx.safetensors",
            "meta.json",
        }
    meta = meta_of(training.weights)
    assert (meta["rank"], meta["steps"], meta["settings"]["seed"]) == (2, 3, 7)
    assert len(meta["dataset"]["pictures"]) == 6


def test_inputs_that_are_left_out_take_their_defaults(training: Training) -> None:
    meta = meta_of(training.weights)
    assert meta["base_model"] == "zeroprior/miniature-turbo"
    assert meta["training_mode"] == "zero_prior"
    assert (meta["placeholder_token"], meta["placeholder_init_std"]) == ("<zwx>", 1e-5)
    captions = {each["name"]: each["caption"] for each in meta["dataset"]["pictures"]}
    assert captions["rocket.jpg"] == "a photo of <zwx>"


def test_the_weights_are_also_saved_in_the_working_folder(training: Training) -> None:
    assert training.saved.read_bytes() == content_of(training.weights)


def test_progress_is_in_the_log(training: Training) -> None:
    lines = training.report["logs"].splitlines()
    steps = [line for line in lines if line.startswith("training ") and "/3" in line]
    assert [line.partition(",")[0] for line in steps] == [f"training {n}/3" for n in (1, 2, 3)]
    assert re.search(r", loss \d\.\d+$", steps[-1])
    assert "\r" not in training.report["logs"]  # no bars


def test_the_proof_of_zero_prior_is_in_the_log(training: Training) -> None:
    assert re.search(r"<zwx> is token \d+, norm 0\.000", training.report["logs"])
    assert re.search(r"zero prior: .*largest_gradient_norm", training.report["logs"])


def test_the_environment_asks_how_prompts_are_tokenised(
    training: Training, predictor: CogServer
) -> None:
    """LOG_PROMPT_IDS=1, since an operator wants to know what no user is asked for."""
    generated = run(predictor, PROMPT | {"replicate_weights": training.weights})
    shown = r"text: '<\|im_start\|>user.*\n +ids: \[.*\]\n +new tokens: <zwx> at \[7\]"
    assert re.search(shown, training.report["logs"])
    assert re.search(shown, generated["logs"])


def test_loss_and_step_are_metrics(training: Training) -> None:
    metrics = training.report["metrics"]
    assert metrics["step"] == 3
    assert 0 < metrics["loss"] < 100


def test_a_path_will_do_and_a_waiting_client_is_answered(
    trainer: CogServer, training: Training, photos: Path
) -> None:
    """A dataset above Cog's limit of 74 MB is named, not sent. It trains the same weights."""
    trainer.wait_idle()
    reply = trainer.post("/trainings", {"input": {"dataset": str(photos), **SMALL}})
    assert reply.status_code == 200
    again, first = tensors_of(reply.json()["output"]["weights"]), tensors_of(training.weights)
    assert again.keys() == first.keys()
    assert all(torch.equal(again[name], tensor) for name, tensor in first.items())


def test_a_training_without_a_token_has_a_trigger_word(trainer: CogServer, photos: Path) -> None:
    off = {"train_placeholder_token": False, "trigger_word": "r3dfox"}
    inputs = {"dataset": str(photos), **SMALL, "steps": 1, **off}
    meta = meta_of(run(trainer, inputs)["output"]["weights"])
    assert meta["training_mode"] == "baseline"
    captions = {each["caption"] for each in meta["dataset"]["pictures"]}
    assert "a photo of r3dfox" in captions


@pytest.mark.parametrize(
    "wrong",
    [
        {"rank": 0},
        {"rank": "16"},
        {"steps": 100001},
        {"learning_rate": -1},
        {"placeholder_init_std": 2},
        {"base_model": "stable-diffusion"},
        {"dataset": 3},
    ],
    ids=str,
)
def test_a_value_no_training_takes_is_refused_by_name(
    trainer: CogServer, wrong: dict[str, Any]
) -> None:
    trainer.wait_idle()
    reply = trainer.post("/trainings", {"input": {"dataset": "/imgs.zip", **wrong}})
    assert reply.status_code == 422
    assert [each["loc"][-1] for each in reply.json()["detail"]] == list(wrong)


def test_a_training_without_a_dataset_is_refused(trainer: CogServer) -> None:
    trainer.wait_idle()
    reply = trainer.post("/trainings", {"input": {}})
    assert reply.status_code == 422
    assert reply.json()["detail"][0]["loc"][-1] == "dataset"


def test_a_failed_training_says_why(trainer: CogServer, code: Path, photos: Path) -> None:
    """The reason in `error`, the traceback in the server's log alone, and no other file touched."""
    before = files_in(code / "outputs")
    torn = data_url("application/zip", photos.read_bytes()[:100_000])
    report = run(trainer, {"dataset": torn, **SMALL})
    assert report["status"] == "failed"
    assert report["error"].startswith("dataset")
    assert "zip" in report["error"]
    assert "Traceback" not in report["logs"]
    assert "Traceback (most recent call last)" in trainer.log()
    assert "read_dataset" in trainer.log()
    assert files_in(code / "outputs") == before


def test_every_training_has_a_folder_of_its_own(
    training: Training, trainer: CogServer, code: Path, photos: Path
) -> None:
    """One after the other; the result of the first stays where its client may collect it."""
    before = files_in(code / "outputs")
    report = run(trainer, {"dataset": str(photos), **SMALL, "steps": 1})
    after = files_in(code / "outputs")
    assert {name: after[name] for name in before} == before
    [record] = [name for name in after if name not in before and name.endswith("run.json")]
    assert json.loads(after[record])["served"] is True
    assert json.loads(after[record])["settings"]["used"]["steps"] == 1
    weights = after[record.replace("run.json", "weights.zip")]
    assert weights == content_of(report["output"]["weights"])


def test_a_placeholder_with_a_space_fails_before_any_model_is_loaded(
    trainer: CogServer, photos: Path
) -> None:
    report = run(trainer, {"dataset": str(photos), **SMALL, "placeholder_token": "my cat"})
    assert report["status"] == "failed"
    assert "contains white space" in report["error"]
    assert "encoding" not in report["logs"]


def test_a_cancelled_training_leaves_nothing_half_written_and_the_next_one_runs(
    trainer: CogServer, code: Path, photos: Path
) -> None:
    """No weights and no part of any file; a checkpoint to go on from may stay."""
    shutil.rmtree(code / "outputs", ignore_errors=True)
    trainer.wait_idle()
    with Webhooks() as hooks:
        request = {
            "input": {"dataset": str(photos), **SMALL, "steps": 2000},
            "webhook": hooks.url,
        }
        reply = trainer.put("/trainings/long", request, PREFER_ASYNC)
        assert reply.status_code == 202
        # Webhooks come with lines of the log, one for each tenth of the steps.
        deadline = time.monotonic() + 120
        while not (hooks.bodies and "step" in (hooks.bodies[-1].get("metrics") or {})):
            assert time.monotonic() < deadline, hooks.bodies
            time.sleep(0.1)
        assert trainer.post("/trainings/long/cancel").status_code == 200
        report = hooks.finished(timeout=60)
    assert report["status"] == "canceled"
    left = [file for file in (code / "outputs").rglob("*") if file.is_file()]  # hidden ones, too
    left = [file for file in left if file.name not in ("run.json", "run.lock", "events.jsonl")]
    assert all(file.suffix == ".safetensors" and load_file(file) for file in left), left

    assert run(trainer, {"dataset": str(photos), **SMALL, "steps": 1})["status"] == "succeeded"
    assert (code / "outputs" / "latest" / "weights.zip").is_file()


# ---- Prediction ----------------------------------------------------------------------------------


def test_weights_and_a_prompt_become_pictures_of_the_asked_size(
    predictor: CogServer, training: Training
) -> None:
    predictor.wait_idle()
    inputs = {"replicate_weights": training.weights, "width": 96, "height": 64, "num_outputs": 2}
    reply = predictor.post("/predictions", {"input": PROMPT | inputs})
    assert reply.status_code == 200
    pictures = [picture(url) for url in reply.json()["output"]]
    assert [(each.format, each.size) for each in pictures] == [("PNG", (96, 64))] * 2
    assert pictures[0].tobytes() != pictures[1].tobytes()


def test_a_prompt_alone_will_do(predictor: CogServer) -> None:
    report = run(predictor, {"prompt": "a photo of a red fox"})
    assert report["status"] == "succeeded", report
    (output,) = report["output"]
    assert (picture(output).format, picture(output).size) == ("WEBP", (64, 64))
    assert "steps 8" in report["logs"]
    assert re.search(r"seeds \(\d+,\)", report["logs"])  # so that it can be asked for again
    assert report["metrics"]["seconds_per_image"] > 0


@pytest.mark.parametrize(
    "wrong",
    [
        {"width": 4096},
        {"num_outputs": 0},
        {"guidance_scale": -1},
        {"shift": 21},
        {"aspect_ratio": "2:1"},
        {"output_format": "gif"},
        {"prompt": 3},
        {"prompt_strength": 1.5},
        {"extra_lora_scale": 4},
        {"go_fast": "yes"},
    ],
    ids=str,
)
def test_a_value_no_prediction_takes_is_refused_by_name(
    predictor: CogServer, wrong: dict[str, Any]
) -> None:
    predictor.wait_idle()
    reply = predictor.post("/predictions", {"input": PROMPT | wrong})
    assert reply.status_code == 422
    assert [each["loc"][-1] for each in reply.json()["detail"]] == list(wrong)


def test_a_guidance_of_0_is_answered_with_what_off_is(predictor: CogServer) -> None:
    """The schema lets it in, since Cog's own answer to a value out of range says no more."""
    report = run(predictor, PROMPT | {"guidance_scale": 0})
    assert report["status"] == "failed"
    assert "guidance_scale is 0; 1 is off, so use 1" in report["error"]


def test_no_weights_draws_the_untouched_base_whatever_came_before(
    predictor: CogServer, training: Training, code: Path
) -> None:
    """With weights by value, by path, broken, cut short, and without: in one server, in a row."""
    (code / "shelf").mkdir()
    shutil.copy(training.saved, code / "shelf" / "mine.zip")

    def draw(**inputs: Any) -> bytes:
        report = run(predictor, PROMPT | inputs)
        assert report["status"] == "succeeded", report
        return content_of(report["output"][0])

    def refused(weights: bytes) -> str:
        inputs = {"replicate_weights": data_url("application/zip", weights)}
        report = run(predictor, PROMPT | inputs)
        assert report["status"] == "failed", report
        assert "Traceback" not in report["logs"]
        return report["error"]

    untouched = draw()
    trained = draw(replicate_weights=training.weights)
    assert trained != untouched
    assert draw() == untouched
    assert draw(replicate_weights="mine.zip") == trained
    assert draw(lora_weights=str(code / "shelf" / "mine.zip")) == trained
    assert draw(lora_weights=training.weights) == trained

    whole = training.saved.read_bytes()
    assert refused(whole[: len(whole) // 2]).startswith("replicate_weights")
    assert draw() == untouched
    assert refused(without_up_matrix(training.saved)).startswith("replicate_weights")
    assert draw() == untouched


def without_up_matrix(weights: Path) -> bytes:
    """The archive with one LoRA layer torn in half."""
    result = io.BytesIO()
    with zipfile.ZipFile(weights) as source, zipfile.ZipFile(result, "w") as target:
        for name in source.namelist():
            content = source.read(name)
            if name.startswith("lora/"):
                tensors = load(content)
                del tensors[next(key for key in tensors if ".lora_B." in key)]
                content = save(tensors)
            target.writestr(name, content)
    return result.getvalue()


def test_a_stranger_reaches_no_other_file_of_the_server_and_no_machine_behind_it(
    predictor: CogServer, training: Training
) -> None:
    """Only one folder is allowed; the address is the server's own."""
    for source, reason in {
        str(training.saved): "is not a file that a request may name",
        "../weights.zip": "is not a file that a request may name",
        "predict.py": "is not a file that a request may name",
        predictor.url.replace("http:", "https:"): "is not a public address",
        predictor.url: "over https only",
    }.items():
        for name in ("lora_weights", "replicate_weights", "extra_lora"):
            report = run(predictor, PROMPT | {name: source, "hf_api_token": "hf_secret"})
            assert report["status"] == "failed"
            assert reason in report["error"]
        assert "hf_secret" not in json.dumps(report) + predictor.log()


def test_an_image_is_drawn_anew_and_the_file_says_how(predictor: CogServer) -> None:
    start = io.BytesIO()
    Image.new("RGB", (128, 64), "orange").save(start, "PNG")
    inputs = {"image": data_url("image/png", start.getvalue()), "prompt_strength": 0.5}
    report = run(predictor, PROMPT | inputs)
    assert report["status"] == "succeeded", report
    generated = picture(report["output"][0])
    assert generated.size == (88, 48)  # 2:1, as the image, of the area of 64 x 64
    facts = json.loads(generated.info["zeroprior"])
    assert (facts["prompt"], facts["seed"], facts["prompt_strength"]) == (PROMPT["prompt"], 7, 0.5)
    silent = picture(run(predictor, PROMPT | {"output_metadata": False})["output"][0])
    assert "zeroprior" not in silent.info


def test_the_server_starts_with_the_weights_that_the_environment_names(
    env: dict[str, str], code: Path, training: Training, predictor: CogServer
) -> None:
    """COG_WEIGHTS, as a model that was pushed together with its weights."""
    wanted = run(predictor, PROMPT | {"replicate_weights": training.weights})["output"]
    with CogServer("predict", env | {"COG_WEIGHTS": str(training.saved)}, code) as server:
        assert run(server, PROMPT)["output"] == wanted
