"""The trackers by name and their constructors. Imports a tracker only when it is created."""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from trainer.settings import Secrets

if TYPE_CHECKING:
    from accelerate.tracking import GeneralTracker

    from trainer.settings import Settings

PROJECT = "zeroprior"  # default project name


def _tensorboard(settings: "Settings", folder: Path, secrets: Secrets) -> "GeneralTracker":
    from accelerate.tracking import TensorBoardTracker

    return TensorBoardTracker(settings.wandb_run or "tensorboard", folder)


def _wandb(settings: "Settings", folder: Path, secrets: Secrets) -> "GeneralTracker":
    from trainer.monitor.wandb_run import WandBRun

    return WandBRun(
        settings.wandb_project or PROJECT,
        settings.wandb_run,
        settings.wandb_entity,
        folder,
        secrets.wandb_api_key,
        secrets.from_request,
    )


def _trackio(settings: "Settings", folder: Path, secrets: Secrets) -> "GeneralTracker":
    from accelerate.tracking import TrackioTracker

    return TrackioTracker(settings.wandb_project or PROJECT, name=settings.wandb_run)


MAKERS: dict[str, Callable[["Settings", Path, Secrets], "GeneralTracker"]] = {
    "tensorboard": _tensorboard,
    "wandb": _wandb,
    "trackio": _trackio,
}
