"""Monitoring of a run: validation, preview images, trackers."""

from trainer.monitor.contact_sheet import thumbnail
from trainer.monitor.default_previews import (
    pair_of,
    previews_while_training,
    with_default_previews,
)
from trainer.monitor.inference_weights import (
    InferenceWeights,
    OwnWeights,
    SecondBase,
    check_originals_fit,
)
from trainer.monitor.preview_images import FOLDER, PreviewImages, step_label
from trainer.monitor.previews import Previews, preview_requests, prompt_features, sample_scale
from trainer.monitor.trackers import Trackers, check_trackers
from trainer.monitor.tracking import TrackerUpdates
from trainer.monitor.validation import (
    Curves,
    Validation,
    hold_out,
    measure_fit,
    split,
    untrained,
)

__all__ = [
    "PreviewImages",
    "Curves",
    "FOLDER",
    "Previews",
    "OwnWeights",
    "SecondBase",
    "InferenceWeights",
    "Trackers",
    "Validation",
    "TrackerUpdates",
    "check_originals_fit",
    "check_trackers",
    "hold_out",
    "split",
    "measure_fit",
    "pair_of",
    "previews_while_training",
    "prompt_features",
    "preview_requests",
    "sample_scale",
    "step_label",
    "thumbnail",
    "untrained",
    "with_default_previews",
]
