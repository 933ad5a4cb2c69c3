"""From trained weights to the result: checks, weights.zip, report, upload."""

from trainer.result.evaluation import Outcome, drift_prompt, hand_over, judge, kept_if_it_fails
from trainer.result.next_steps import describe_next_steps
from trainer.result.publishing import check_repository, publish, withhold
from trainer.result.report import Told
from trainer.result.result_checks import Worthless
from trainer.result.verdict import BROKEN, Verdict

__all__ = [
    "BROKEN",
    "Outcome",
    "Told",
    "Verdict",
    "Worthless",
    "check_repository",
    "drift_prompt",
    "hand_over",
    "judge",
    "kept_if_it_fails",
    "describe_next_steps",
    "publish",
    "withhold",
]
