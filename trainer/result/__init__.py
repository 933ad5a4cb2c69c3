"""The result of a run: checks, weights.zip, report, upload."""

from trainer.result.drift import drift_prompts
from trainer.result.evaluation import (
    Outcome,
    check_model,
    evaluate,
    keep_weights_on_error,
    write_weights,
)
from trainer.result.meta import DatasetFile, describe_run, versions
from trainer.result.next_steps import describe_next_steps
from trainer.result.publishing import check_repository, publish, withhold
from trainer.result.record import TrainingRecord
from trainer.result.result_checks import Worthless
from trainer.result.verdict import BROKEN, Verdict

__all__ = [
    "BROKEN",
    "DatasetFile",
    "Outcome",
    "TrainingRecord",
    "Verdict",
    "Worthless",
    "check_model",
    "check_repository",
    "drift_prompts",
    "evaluate",
    "write_weights",
    "keep_weights_on_error",
    "describe_next_steps",
    "describe_run",
    "versions",
    "publish",
    "withhold",
]
