"""The parts of one studio that work together: runs, their processes, the queue, images."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from studio.folder import Studio
from studio.processes import Processes
from studio.queue import Queue
from studio.summaries import Runs

if TYPE_CHECKING:
    from studio.captioner import CaptionWriter
    from studio.generator import Generator
    from studio.planner import Planner

_JOBS: dict[Path, "Jobs"] = {}


@dataclass
class Jobs:
    """One for each studio's folder, in memory; everything that must last is on disk."""

    studio: Studio
    processes: Processes
    runs: Runs
    queue: Queue
    keys: dict[str, str] = field(default_factory=dict)  # of requests, and the run of their answer
    planner: "Planner | None" = None
    generator: "Generator | None" = None
    captions: "CaptionWriter | None" = None


def jobs_of(studio: Studio) -> Jobs:
    """The jobs of a studio."""
    if studio.folder not in _JOBS:
        processes = Processes()
        runs = Runs(studio, processes)
        _JOBS[studio.folder] = Jobs(studio, processes, runs, Queue(studio, runs, processes))
    return _JOBS[studio.folder]


def forget(studio: Studio) -> None:
    """Forgets what is in memory, as the end of the server's process does."""
    _JOBS.pop(studio.folder, None)
