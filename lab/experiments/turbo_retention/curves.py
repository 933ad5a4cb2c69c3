"""The measures that are told: which column of the table, of which prompts, drawn in which way."""

from dataclasses import replace

from lab.experiments.turbo_retention.design import EIGHT, FEW, MANY, UNDISTILLED
from lab.experiments.turbo_retention.results import Curve

LIKENESS = Curve("Likeness to the subject, 8 steps", "likeness", "subject", EIGHT, 2)
SUBJECT_RIGHT = Curve(
    "Attributes right, prompts with the subject, 8 steps, %", "right", "subject", EIGHT, 1
)
FREE_RIGHT = Curve("Attributes right, other prompts, 8 steps, %", "right", "free", EIGHT, 1)
FREE_WHOLE = Curve("Images all right, other prompts, 8 steps, %", "whole", "free", EIGHT, 1)
DRIFT = Curve("Drift on other prompts, 8 steps, RMS of pixels", "pixels", "free", EIGHT, 3)
SHARPNESS_2 = Curve("Sharpness, other prompts, 2 steps, of turbo's", "sharpness", "free", FEW, 2)
SHARPNESS_8 = replace(SHARPNESS_2, title="Sharpness, other prompts, 8 steps, of turbo's", way=EIGHT)
SHARPNESS_30 = replace(
    SHARPNESS_2, title="Sharpness, other prompts, 30 guided steps, of turbo's", way=MANY
)
SHARE = Curve("Share of the adapter in the LoRA's weights", "share", "weights", None, 3)
OWN_BASE = Curve(
    "Likeness on its own base, 30 guided steps", "likeness", "subject", MANY, 2, UNDISTILLED
)

PAIRED = (LIKENESS, SUBJECT_RIGHT, FREE_RIGHT, SHARPNESS_2, SHARPNESS_8, SHARPNESS_30, SHARE)
PLOTTED = (LIKENESS, FREE_RIGHT, DRIFT, SHARPNESS_2, SHARPNESS_8, SHARE)
TOLD = (
    LIKENESS,
    SUBJECT_RIGHT,
    FREE_RIGHT,
    FREE_WHOLE,
    DRIFT,
    Curve("Distance to renderings, other prompts, 8 steps", "distance", "free", EIGHT, 2),
    SHARPNESS_8,
    Curve("Images all right, other prompts, 2 steps, %", "whole", "free", FEW, 1),
    Curve("Distance to renderings, other prompts, 2 steps", "distance", "free", FEW, 2),
    SHARPNESS_2,
    Curve("Likeness to the subject, 30 guided steps", "likeness", "subject", MANY, 2),
    Curve("Attributes right, prompts with the subject, 30 guided steps, %", "right", "subject",
          MANY, 1),
    Curve("Attributes right, other prompts, 30 guided steps, %", "right", "free", MANY, 1),
    SHARPNESS_30,
    SHARE,
)  # fmt: skip
