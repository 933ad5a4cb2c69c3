"""Trackers: TensorBoard, Weights & Biases and Trackio, through accelerate's own.

What goes wrong before a model is loaded is an error; what goes wrong later costs the tracker and
never the training. Only the main process of several tracks.

    loss, learning_rate/…, gradient_norm/…, placeholder_norm    about 200 times in a run
    validation/loss, validation/sigma_0.25, …                   where it is measured
    samples/00, …                                               pictures, where they are drawn
"""

import importlib.util
import logging
import os
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from accelerate import PartialState
from accelerate.tracking import GeneralTracker, TensorBoardTracker, TrackioTracker, WandBTracker
from PIL import Image

from trainer.secret import Secret, hidden
from trainer.settings import Settings, SettingsError

log = logging.getLogger(__name__)

PROJECT = "zeroprior"  # where none is named
FOLDER = "trackers"  # of what TensorBoard and wandb write, beside weights.zip
PATIENCE = 60.0  # seconds that a tracker may take to send what is left when all is done
_LOCAL = {"dataset", "output_dir", "resume_from", "name", "given"}  # what is of one machine


def _tensorboard(settings: Settings, folder: Path, key: Secret | None) -> GeneralTracker:
    return TensorBoardTracker(settings.wandb_run or "tensorboard", folder)


def _wandb(settings: Settings, folder: Path, key: Secret | None) -> GeneralTracker:
    import wandb

    # Given to the run alone: wandb.login would write it into the home folder.
    options: dict[str, Any] = {} if key is None else {"api_key": key.reveal()}
    return WandBTracker(
        settings.wandb_project or PROJECT,
        name=settings.wandb_run,
        entity=settings.wandb_entity,
        dir=str(folder),
        settings=wandb.Settings(console="off", disable_git=True, save_code=False, **options),
    )


def _trackio(settings: Settings, folder: Path, key: Secret | None) -> GeneralTracker:
    return TrackioTracker(settings.wandb_project or PROJECT, name=settings.wandb_run)


TRACKERS: dict[str, Callable[[Settings, Path, Secret | None], GeneralTracker]] = {
    "tensorboard": _tensorboard,
    "wandb": _wandb,
    "trackio": _trackio,
}


def check_trackers(names: Sequence[str]) -> None:
    """Raises `SettingsError` for a tracker that is unknown or not installed; imports none."""
    for name in names:
        if name not in TRACKERS:
            raise SettingsError(f"trackers: {name!r} is not one of {', '.join(TRACKERS)}")
    missing = [name for name in dict.fromkeys(names) if importlib.util.find_spec(name) is None]
    if missing:
        raise SettingsError(
            f"trackers: {', '.join(missing)} {'is' if len(missing) == 1 else 'are'} not "
            f"installed; pip install {' '.join(missing)}, or leave out of trackers"
        )


class Trackers:
    """The trackers of one training, open from before the base is loaded until all is written."""

    def __init__(self, settings: Settings, folder: Path, wandb_api_key: Secret | None = None):
        """Starts them. Raises `SettingsError` for one that cannot be, without its key."""
        self._secrets = (wandb_api_key, Secret.of(os.environ.get("WANDB_API_KEY")))
        self._open: dict[str, GeneralTracker] = {}
        check_trackers(settings.trackers)
        if not settings.trackers or not PartialState().is_main_process:
            return
        folder = folder / FOLDER
        folder.mkdir(parents=True, exist_ok=True)
        for name in dict.fromkeys(settings.trackers):
            try:
                tracker = TRACKERS[name](settings, folder, wandb_api_key)
                tracker.start()
                tracker.store_init_configuration(configuration(settings))
            except Exception as error:
                self.close()
                raise SettingsError(
                    f"trackers: {name} does not start ({self._said(error)}); mend that or leave "
                    f"it out of trackers"
                    + (". WANDB_MODE=offline needs neither key nor network" * (name == "wandb"))
                ) from None
            self._open[name] = tracker

    def __bool__(self) -> bool:
        return bool(self._open)

    def log(self, values: Mapping[str, float], step: int) -> None:
        """Numbers of one step, under the names above."""
        self._each("log numbers", lambda tracker: tracker.log(dict(values), step=step))

    def pictures(self, values: Mapping[str, Image.Image], step: int) -> None:
        """Pictures of one step, one under each name."""

        def send(tracker: GeneralTracker) -> None:
            if isinstance(tracker, TensorBoardTracker):
                for name, picture in values.items():
                    pixels = np.asarray(picture.convert("RGB"))[None]
                    tracker.log_images({name: pixels}, step=step, dataformats="NHWC")
            elif isinstance(tracker, WandBTracker):
                tracker.log_images({name: [each] for name, each in values.items()}, step=step)
            else:
                import trackio

                tracker.log({k: trackio.Image(each) for k, each in values.items()}, step=step)

        self._each("log pictures", send)

    def close(self) -> None:
        """Sends what is left. A tracker that takes longer than `PATIENCE` is left behind."""
        for name, tracker in list(self._open.items()):
            failed: list[Exception] = []

            def finish(tracker: GeneralTracker = tracker, failed: list = failed) -> None:
                try:
                    tracker.finish()
                except Exception as error:
                    failed.append(error)

            worker = threading.Thread(target=finish, daemon=True)
            worker.start()
            worker.join(PATIENCE)
            if worker.is_alive():
                log.warning("%s is still sending after %g s; it is left behind", name, PATIENCE)
            elif failed:
                log.warning("%s did not close well: %s", name, self._said(failed[0]))
        self._open = {}

    def _each(self, what: str, call: Callable[[GeneralTracker], None]) -> None:
        for name, tracker in list(self._open.items()):
            try:
                call(tracker)
            except Exception as error:  # whatever it is, hours of training are worth more
                del self._open[name]
                log.warning(
                    "%s could not %s (%s); the training goes on without it",
                    *(name, what, self._said(error)),
                )

    def _said(self, error: Exception) -> str:
        return hidden(f"{type(error).__name__}: {error}", *self._secrets)

    def __enter__(self) -> "Trackers":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


def configuration(settings: Settings) -> dict[str, Any]:
    """The settings as trackers take them: text, numbers, true and false."""
    values: dict[str, Any] = {}
    for each in fields(settings):
        value = getattr(settings, each.name)
        if each.name == "base":
            values["base_model"] = value.hub_id
        elif each.name not in _LOCAL and value is not None:
            values[each.name] = value if isinstance(value, (bool, int, float)) else _text(value)
    return values


def _text(value: Any) -> str:
    if isinstance(value, (tuple, list)):
        return ", ".join(map(str, value))
    if isinstance(value, dict):
        return ", ".join(f"{key} {entry}" for key, entry in value.items())
    return Path(value).name if isinstance(value, Path) else str(value)
