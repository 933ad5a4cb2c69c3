"""What is uploaded can be used: by diffusers alone, as its own card says, and by us."""

import logging
import zipfile
from pathlib import Path

import pytest
from cards import Finished
from hub_server import Hub

from adapters.archive import read_archive
from trainer.result.publishing import publish
from trainer.run import train
from trainer.run_files import UPLOAD
from trainer.settings.fields import SettingsError, resolve
from trainer.settings.inputs import TrainingInputs
from trainer.settings.secret import Secret, Secrets

# ---- At its end ----------------------------------------------------------------------------------


@pytest.mark.parametrize("step", ["/api/repos/create", "/preupload/", "/large/", "/commit/"])
def test_an_upload_that_fails_leaves_the_weights_and_says_how_to_repeat_it(
    step: str, finished: Finished, hub: Hub, caplog: pytest.LogCaptureFixture
) -> None:
    weights = finished()
    hub.refuse[step] = 403
    with caplog.at_level(logging.WARNING, "trainer"):
        assert publish(weights, "me/fox", Secret(hub.token)) is None
    [warning] = [
        each.getMessage() for each in caplog.records if each.name == "trainer.result.publishing"
    ]
    assert f"The weights are saved in {weights}" in warning and weights.is_file()
    folder = weights.parent / "hub-upload"
    assert warning.endswith(f"hf upload me/fox {folder}")
    assert {"README.md", "weights.zip"} <= {path.name for path in folder.iterdir()}
    assert hub.token not in caplog.text


def test_an_upload_is_repeated_in_the_place_of_the_one_that_failed(
    finished: Finished, hub: Hub
) -> None:
    weights = finished()
    written = weights.read_bytes()
    hub.refuse["/commit/"] = 403
    for _ in range(2):
        assert publish(weights, "me/fox", Secret(hub.token)) is None
    hub.refuse.clear()
    assert publish(weights, "me/fox", Secret(hub.token)) is not None
    assert hub.files["me/fox"]["weights.zip"] == weights.read_bytes() == written
    assert not (weights.parent / "hub-upload").exists()


def test_an_upload_that_went_well_leaves_no_second_copy(finished: Finished, hub: Hub) -> None:
    weights = finished()
    publish(weights, "me/fox", Secret(hub.token))
    names = {path.name for path in weights.parent.iterdir()}
    assert names == {"weights.zip", "samples", "report.html"}
    assert hub.files["me/fox"]["weights.zip"] == weights.read_bytes()


# ---- The whole way ------------------------------------------------------------------------------


def test_a_watched_and_published_training_shows_its_keys_nowhere(
    photos: Path,
    use_vault: Path,
    hub: Hub,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    capfd: pytest.CaptureFixture[str],
) -> None:
    pytest.importorskip("wandb")
    from cog import Secret as CogSecret
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    from trainer.run import train_from_inputs

    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    key = "0123456789abcdef0123456789abcdef01234567"
    with caplog.at_level(logging.DEBUG, "trainer"):
        weights = train_from_inputs(
            TrainingInputs(
                dataset=photos,
                base_model="z-image",
                resolution=64,
                rank=2,
                steps=2,
                seed=5,
                output_dir=tmp_path / "out",
                sample_prompts="a photo of <zwx>",
                preserve="off",
                sample_options={"width": 64, "height": 64, "num_inference_steps": 2},
                trackers="tensorboard,wandb",
                wandb_project="foxes",
                hf_repo_id="me/fox",
            ),
            wandb_api_key=CogSecret(key),
            hf_token=CogSecret(hub.token + "\n"),
        )

    # The trackers saw what there was to see.
    events = EventAccumulator(str(weights.parent / "trackers" / "tensorboard")).Reload()
    scalars = set(events.Tags()["scalars"])
    assert {"loss", "learning_rate/lora", "learning_rate/placeholder"} <= scalars
    assert {"gradient_norm/lora", "gradient_norm/placeholder", "placeholder_norm"} <= scalars
    # Of few images none is held out.
    assert "fit/loss" in scalars and any("fit/sigma_" in name for name in scalars)
    assert [event.step for event in events.Scalars("loss")] == [1, 2]
    assert events.Images("samples/00")[-1].step == 2
    # The Hub holds the result, and its card was made of this very training.
    files = hub.files["me/fox"]
    assert files["weights.zip"] == weights.read_bytes()
    assert files["report.html"] == (weights.parent / "report.html").read_bytes()
    card = files["README.md"].decode()
    assert "| steps | 2 |" in card and "encode('a photo of <zwx>')" in card
    assert files["samples/00.png"].startswith(b"\x89PNG")
    # Neither key is anywhere.
    written = [path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()]
    said = "".join(capfd.readouterr()) + caplog.text
    for secret in (key, hub.token):
        assert secret not in said
        assert not [each for each in (*written, *files.values()) if secret.encode() in each]
        with zipfile.ZipFile(weights) as zipped:  # members are stored as they are, but be sure
            assert not [n for n in zipped.namelist() if secret.encode() in zipped.read(n)]


@pytest.mark.parametrize("allowed", [False, True])
def test_a_result_whose_checks_failed_is_uploaded_only_if_that_is_allowed(
    allowed: bool,
    photos: Path,
    use_vault: Path,
    hub: Hub,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    settings = resolve(
        TrainingInputs(
            dataset=photos,
            base_model="z-image",
            resolution=64,
            rank=2,
            steps=2,
            batch_size=1,
            learning_rate=1,
            validation_every=0,
            preserve="off",
            output_dir=tmp_path / "out",
            hf_repo_id="me/fox",
            allow_failed_checks=allowed,
        )
    )
    weights = train(settings, secrets=Secrets(hf_token=Secret(hub.token)))
    assert weights.is_file() and read_archive(weights).meta["result"] == "broken"
    assert ("me/fox" in hub.files) == allowed
    if not allowed:
        folder = weights.parent / UPLOAD
        command = f"hf repo create me/fox --private --exist-ok && hf upload me/fox {folder}"
        assert f"since checks failed. To upload it by hand: {command}" in caplog.text
        assert (folder / "weights.zip").is_file() and (folder / "README.md").is_file()


def test_a_token_that_cannot_write_costs_no_training(
    photos: Path, use_vault: Path, hub: Hub, tmp_path: Path
) -> None:
    from trainer.run import train_from_inputs

    hub.user["auth"]["accessToken"]["role"] = "read"
    with pytest.raises(SettingsError, match="is read-only"):
        train_from_inputs(
            TrainingInputs(dataset=photos, output_dir=tmp_path / "out", hf_repo_id="me/fox"),
            hf_token=hub.token,
        )
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("key", "variable"), [("hf_token", "HF_TOKEN"), ("wandb_api_key", "WANDB")]
)
def test_a_key_in_a_file_is_refused_unshown_and_sent_to_the_environment(
    key: str, variable: str, tmp_path: Path
) -> None:
    from trainer.settings.config import read_config

    (tmp_path / "run.yaml").write_text(f"dataset: a.zip\ntrain: {{{key}: hf_abcdef}}\n")
    with pytest.raises(
        SettingsError, match=f"{key}; secrets do not belong in files; set {variable}"
    ) as no:
        read_config(tmp_path / "run.yaml")
    assert "hf_abcdef" not in str(no.value)
