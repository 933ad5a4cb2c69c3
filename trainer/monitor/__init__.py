"""What is measured and shown during a run: validation, preview images, trackers."""

from trainer.monitor.contact_sheet import thumbnail
from trainer.monitor.default_previews import previews_while_training, with_default_previews
from trainer.monitor.preview_images import FOLDER, Album, step_label
from trainer.monitor.previews import Previews, prompt_features, sample_drawings, sample_scale
from trainer.monitor.stage import SecondBase, Stage
from trainer.monitor.trackers import Trackers, check_trackers
from trainer.monitor.tracking import Watching
from trainer.monitor.validation import Curves, Validation, count_held_out, hold_out, untrained

__all__ = [
    "Album",
    "Curves",
    "FOLDER",
    "Previews",
    "SecondBase",
    "Stage",
    "Trackers",
    "Validation",
    "Watching",
    "check_trackers",
    "count_held_out",
    "hold_out",
    "previews_while_training",
    "prompt_features",
    "sample_drawings",
    "sample_scale",
    "step_label",
    "thumbnail",
    "untrained",
    "with_default_previews",
]
