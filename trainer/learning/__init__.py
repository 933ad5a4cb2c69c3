"""The training loop and its parts: encoded data, loss, optimizers, checkpoints."""

from trainer.learning.batches import warn_repeats
from trainer.learning.best_weights import keep_best, load_best, why_ended
from trainer.learning.caption_length import check_texts
from trainer.learning.checkpoint import Checkpoint
from trainer.learning.control import Control, Stopped
from trainer.learning.distributed import (
    ProcessLost,
    by_main,
    check_launch,
    least_of_all,
    lost_processes_named,
    processes,
    same_for_all,
    sharing,
)
from trainer.learning.features import BATCH_PIXELS, BATCH_TOKENS, Captions, encode_images
from trainer.learning.history import History, Trained
from trainer.learning.loop import Loop
from trainer.learning.loss import draw_noise, flow_loss, noisy, weighted
from trainer.learning.preservation import Preservation, preservation_prompts
from trainer.learning.randomness import generator
from trainer.learning.references import on_device, velocity
from trainer.learning.regularization import encode_regularization
from trainer.learning.resume import continue_weights, data_identity, read_resume, with_seed
from trainer.learning.samples import Sample, edits_of, references_of, uncropped_of, weights_of
from trainer.learning.saving import Diverged, Saver
from trainer.learning.signals import stopped_by_signals
from trainer.learning.step_report import Report
from trainer.learning.step_weights import describe_weights, size_of
from trainer.learning.timesteps import NoiseLevels
from trainer.learning.turbo_adapter import find_turbo_adapter, transformer_with
from trainer.learning.zero_prior import ZeroPriorBroken, ZeroPriorProof

__all__ = [
    "BATCH_PIXELS",
    "BATCH_TOKENS",
    "Captions",
    "Checkpoint",
    "Control",
    "Diverged",
    "History",
    "Loop",
    "NoiseLevels",
    "Preservation",
    "ProcessLost",
    "Report",
    "Sample",
    "Saver",
    "Stopped",
    "Trained",
    "ZeroPriorBroken",
    "ZeroPriorProof",
    "by_main",
    "check_launch",
    "check_texts",
    "continue_weights",
    "data_identity",
    "describe_weights",
    "draw_noise",
    "edits_of",
    "encode_images",
    "encode_regularization",
    "flow_loss",
    "generator",
    "keep_best",
    "load_best",
    "least_of_all",
    "lost_processes_named",
    "noisy",
    "on_device",
    "preservation_prompts",
    "processes",
    "read_resume",
    "references_of",
    "same_for_all",
    "size_of",
    "sharing",
    "uncropped_of",
    "velocity",
    "warn_repeats",
    "weighted",
    "weights_of",
    "why_ended",
    "with_seed",
    "stopped_by_signals",
    "find_turbo_adapter",
    "transformer_with",
]
