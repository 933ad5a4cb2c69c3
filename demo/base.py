"""The demo's base model: the embedded miniature, or the same with random weights."""

import os
from pathlib import Path

from families.bases import BASES
from families.repository import MissingModel, component_folder

NAME = "miniature-turbo"
VAULT = Path(".cache/vault")  # for the random weights; neither in git nor in the image


def choose() -> None:
    """Makes the miniature what `auto` means, on a GPU too.

    As long as its trained weights are nowhere, seeded random ones are written into `VAULT`.
    """
    os.environ["BASE_MODEL"] = NAME
    try:
        component_folder(BASES[NAME], "transformer")
    except MissingModel:
        _write_random()


def _write_random() -> None:
    from diffusers.utils import logging as diffusers_log
    from transformers.utils import logging as transformers_log

    from miniature.models import write_random

    print(
        f"{NAME} has no trained weights here: random ones take their place, "
        "which show the plumbing, not pictures.",
        flush=True,
    )
    # What the libraries say about casting and writing small files is not for the user.
    level = diffusers_log.get_verbosity()
    diffusers_log.set_verbosity_error()
    transformers_log.disable_progress_bar()
    write_random(VAULT / BASES[NAME].hub_id, seed=0)
    diffusers_log.set_verbosity(level)
    transformers_log.enable_progress_bar()
    os.environ["MODEL_VAULT"] = str(VAULT)
