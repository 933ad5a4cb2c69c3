"""The settings of a training run, and their checks. Imports no PyTorch."""

from trainer.settings.checks import high_rates, missing_for_optimizer, missing_here
from trainer.settings.choices import MAX_STEPS, OPTIMIZERS, SCHEDULED
from trainer.settings.config import read_config
from trainer.settings.fields import Settings, resolve
from trainer.settings.inputs import GROUPS, SettingsError, TrainingInputs
from trainer.settings.jobs.reading import program_of
from trainer.settings.pairs import for_pairs
from trainer.settings.parsing import JOB_SUFFIXES, parse
from trainer.settings.preservation import (
    BEGINS,
    LEAST_IMAGES,
    MOST_REGULARIZATION,
    SUBJECT_EVERY,
    Extent,
    extent_of,
    first_step,
    sort_prompts,
)
from trainer.settings.presets import PRESETS, Preset
from trainer.settings.request_cost import too_many, too_much
from trainer.settings.secret import Secret, Secrets, hidden
from trainer.settings.subject_marks import (
    NO_SUBJECT,
    TRIGGER_MARK,
    marks_in,
    with_trigger,
    without_mark,
)
from trainer.settings.subjects import Subject

__all__ = [
    "BEGINS",
    "Extent",
    "GROUPS",
    "JOB_SUFFIXES",
    "LEAST_IMAGES",
    "MOST_REGULARIZATION",
    "MAX_STEPS",
    "NO_SUBJECT",
    "OPTIMIZERS",
    "PRESETS",
    "Preset",
    "SCHEDULED",
    "SUBJECT_EVERY",
    "Secret",
    "Secrets",
    "Settings",
    "SettingsError",
    "Subject",
    "TRIGGER_MARK",
    "TrainingInputs",
    "extent_of",
    "first_step",
    "for_pairs",
    "hidden",
    "high_rates",
    "marks_in",
    "missing_for_optimizer",
    "missing_here",
    "parse",
    "program_of",
    "read_config",
    "resolve",
    "sort_prompts",
    "too_many",
    "too_much",
    "with_trigger",
    "without_mark",
]
