"""Trackers: TensorBoard, Weights & Biases and Trackio, by accelerate's tracker classes.

A tracker that fails before a model is loaded is an error. One that fails later is disabled with a
warning, and the run continues. Of several processes, only the main process logs.

    loss, learning_rate/…, gradient_norm/…, placeholder_norm    about 200 times in a run
    validation/loss, validation/sigma_0.25, …                   on held-out images; without: fit/…
    samples/00, …                                               preview images
"""

import importlib.util
import logging
import os
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from accelerate import PartialState
from accelerate.tracking import GeneralTracker, TensorBoardTracker, WandBTracker
from PIL import Image

from trainer.monitor.in_thread import InThread
from trainer.monitor.tracker_kinds import MAKERS
from trainer.monitor.wandb_run import WandBRun
from trainer.settings import Secret, Secrets, Settings, SettingsError, hidden

log = logging.getLogger(__name__)

FOLDER = "trackers"  # files of TensorBoard and wandb, next to weights.zip
TIMEOUT = 60.0  # seconds to send the remaining data at the end
STOP_TIMEOUT = 5.0  # seconds until a killed tracker has cleaned up
_NO_SECRETS = Secrets()
_LOCAL = {"dataset", "output_dir", "resume_from", "name", "given"}  # local paths and names


def check_trackers(names: Sequence[str], secrets: Secrets = _NO_SECRETS) -> None:
    """Raises `SettingsError` for a tracker that is unknown, not installed or has no key.

    Imports no tracker. A request must contain the tracker's key: keys and logins on a server belong
    to its operator.
    """
    for name in names:
        if name not in MAKERS:
            raise SettingsError(f"trackers: {name!r} is not one of {', '.join(MAKERS)}")
    if secrets.from_request and "wandb" in names and secrets.wandb_api_key is None:
        raise SettingsError(
            "trackers: wandb needs wandb_api_key in the same request; a server uses no other key"
        )
    if secrets.from_request and "trackio" in names:  # it would use the operator's login
        raise SettingsError(
            "trackers: trackio is not available on a server, since a request brings no key for "
            "it; use tensorboard or wandb"
        )
    missing = [name for name in dict.fromkeys(names) if importlib.util.find_spec(name) is None]
    if missing:
        raise SettingsError(
            f"trackers: {', '.join(missing)} {'is' if len(missing) == 1 else 'are'} not "
            f"installed; pip install {' '.join(missing)}, or remove from trackers"
        )


class Trackers:
    """The trackers of one run, open from before the base is loaded until all files are written."""

    def __init__(
        self,
        settings: Settings,
        folder: Path,
        wandb_api_key: Secret | None = None,
        from_request: bool = False,
    ) -> None:
        """Starts the trackers. Raises `SettingsError` if one fails; its key is redacted."""
        secrets = Secrets(wandb_api_key=wandb_api_key, from_request=from_request)
        self._secrets = (wandb_api_key, Secret.of(os.environ.get("WANDB_API_KEY")))
        self._open: dict[str, GeneralTracker] = {}
        self._broken: dict[str, GeneralTracker] = {}
        self._call: InThread | None = None  # the last call that may block
        check_trackers(settings.trackers, secrets)
        if not settings.trackers or not PartialState().is_main_process:
            return
        folder = (folder / FOLDER).absolute()  # trackers open files later, from other threads
        folder.mkdir(parents=True, exist_ok=True)
        for name in dict.fromkeys(settings.trackers):
            try:
                tracker = MAKERS[name](settings, folder, secrets)
                self._broken[name] = tracker  # until it is started
                self._call = InThread(partial(_start, tracker, settings))
                self._call.result()
            except Exception as error:
                self.close()
                raise SettingsError(
                    f"trackers: {name} does not start ({self._redacted(error)}); fix that or "
                    "remove it from trackers"
                    + (". WANDB_MODE=offline needs neither key nor network" * (name == "wandb"))
                ) from None
            except BaseException:  # cancelled: do not wait
                self._stop([*self._open.values(), *self._broken.values()])
                raise
            self._open[name] = self._broken.pop(name)

    def __bool__(self) -> bool:
        return bool(self._open)

    def log(self, values: Mapping[str, float], step: int) -> None:
        """Logs the numbers of one step, with the names above."""
        self._each("log numbers", lambda tracker: tracker.log(dict(values), step=step))

    def images(self, values: Mapping[str, Image.Image], step: int) -> None:
        """Logs the images of one step by name."""

        def send(tracker: GeneralTracker) -> None:
            if isinstance(tracker, TensorBoardTracker):
                for name, image in values.items():
                    pixels = np.asarray(image.convert("RGB"))[None]
                    tracker.log_images({name: pixels}, step=step, dataformats="NHWC")
            elif isinstance(tracker, WandBTracker):
                tracker.log_images({name: [each] for name, each in values.items()}, step=step)
            else:
                import trackio

                tracker.log({k: trackio.Image(each) for k, each in values.items()}, step=step)

        self._each("log images", send)

    def close(self) -> None:
        """Sends the remaining data. A tracker that needs longer than `TIMEOUT` is stopped."""
        closing = [(name, each, each.finish) for name, each in self._open.items()]
        closing += [
            (name, each, each.forget)
            for name, each in self._broken.items()
            if isinstance(each, WandBRun)
        ]
        self._open, self._broken = {}, {}
        try:
            for name, tracker, finish in closing:
                try:
                    self._call = InThread(finish)
                    self._call.result(TIMEOUT)
                except TimeoutError:
                    log.warning("%s is still sending after %g s and is stopped", name, TIMEOUT)
                    self._stop([tracker])
                except Exception as error:
                    log.warning("%s failed to close: %s", name, self._redacted(error))
        except BaseException:  # cancelled: do not wait
            self._stop([tracker for _, tracker, _ in closing])
            raise

    def _each(self, what: str, call: Callable[[GeneralTracker], None]) -> None:
        for name, tracker in list(self._open.items()):
            try:
                call(tracker)
            except Exception as error:  # a failed tracker must not stop the run
                self._broken[name] = self._open.pop(name)
                log.warning(
                    "%s could not %s (%s); the run continues without it",
                    *(name, what, self._redacted(error)),
                )

    def _stop(self, trackers: Sequence[GeneralTracker]) -> None:
        """Ends the trackers' processes immediately, so that none affects the next run.

        A blocked call returns when its process is dead. It is awaited: its own cleaning up would
        otherwise end the session of the next run.
        """
        for tracker in trackers:
            if not isinstance(tracker, WandBRun):
                continue
            until = time.monotonic() + STOP_TIMEOUT
            tracker.kill()
            while self._call is not None and not self._call.ended and time.monotonic() < until:
                time.sleep(0.02)
                tracker.kill()  # also a process that has just been started
            try:
                InThread(tracker.forget).result(STOP_TIMEOUT)
            except Exception as error:
                log.debug("a stopped tracker: %s", type(error).__name__)

    def _redacted(self, error: Exception) -> str:
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


def _start(tracker: GeneralTracker, settings: Settings) -> None:
    tracker.start()
    tracker.store_init_configuration(configuration(settings))


def configuration(settings: Settings) -> dict[str, Any]:
    """The settings as text, numbers and booleans, the types that trackers accept."""
    values: dict[str, Any] = {"base_model": settings.base.hub_id}
    for name, value in settings.model_dump(exclude={"base", *_LOCAL}, exclude_none=True).items():
        values[name] = value if isinstance(value, (bool, int, float)) else _text(value)
    return values


def _text(value: Any) -> str:
    if isinstance(value, (tuple, list)):
        return ", ".join(map(str, value))
    if isinstance(value, dict):
        return ", ".join(f"{key} {entry}" for key, entry in value.items())
    return Path(value).name if isinstance(value, Path) else str(value)
