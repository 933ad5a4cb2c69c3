"""Recognizes the job files of other programs by their content, and reads them to our inputs."""

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from families.redact import looks_like_address
from inference.request import Request
from trainer.settings.inputs import SettingsError, TrainingInputs
from trainer.settings.jobs import (
    ai_toolkit,
    diffusion_pipe,
    musubi,
    onetrainer,
    replicate,
    simpletuner,
)
from trainer.settings.jobs.translation import Program, translate

log = logging.getLogger(__name__)

_MODULES = (ai_toolkit, musubi, simpletuner, onetrainer, diffusion_pipe, replicate)
PROGRAMS: tuple[Program, ...] = tuple(each.PROGRAM for each in _MODULES)


def program_of(content: Any) -> Program | None:
    """The program whose job file has this content, or None."""
    return next((each for each in PROGRAMS if each.is_job(content)), None)


def read_job(
    path: Path,
    content: Any,
    program: Program,
    defaults: Mapping[str, Any],
    overrides: Mapping[str, Any],
) -> TrainingInputs:
    """The inputs of a job; logs how every key was translated.

    `overrides` are inputs that replace those of the job, `defaults` those that it lacks. Raises
    `SettingsError` that lists all refused keys.
    """
    try:
        found = translate(program, content, path, overrides)
    except SettingsError as error:
        raise SettingsError(f"{path}, a job of {program.name}: {error}") from error
    log.info("%s is a job of %s, read as in its version %s", path, program.name, program.source)
    for title, lines in (
        ("translated", found.translated),
        ("similar, but not equal here", found.near),
        ("not supported, and without effect on the weights", found.without_effect),
    ):
        if lines:
            log.info("%s:\n  %s", title, "\n  ".join(lines))
    if found.refused:
        raise SettingsError(
            f"{path}: these keys of a job of {program.name} change the training and are not "
            "supported:\n  "
            + "\n  ".join(found.refused)
            + "\nremove them to train without them, or change them as shown"
        )
    settings = dict(found.settings)
    epochs = settings.pop("epochs", {})
    settings["epochs"] = {name: value for name, value in epochs.items() if name not in overrides}
    try:
        for prompt in settings["sample_prompts"]:
            Request(prompt=prompt, **found.sample)  # generated later, checked here
        if "dataset" in defaults and looks_like_address(str(settings.get("dataset"))):
            del settings["dataset"]  # a plan downloads nothing
        return TrainingInputs(
            **{**defaults, "sample_options": found.sample, **settings, **overrides}
        )
    except ValueError as error:
        raise SettingsError(f"{path}: {error}") from error
