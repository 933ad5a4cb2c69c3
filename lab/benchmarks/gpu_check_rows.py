"""What the parts of `lab.benchmarks.gpu_check` share: a row of the table, and what is run."""

import gc
import os
import tempfile
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch

from trainer.memory.plan import LADDER, Mode

PASSED, FAILED, SKIPPED, MEASURED = "passed", "failed", "skipped", "measured"
BLOCKS, TEXT_LAYERS = 6, 6  # of models that are not measured at their published size
MODELS = "models-"  # in the names of folders
ALL_MODES = (*LADDER, Mode("nf4", False, True), Mode("nf4", True, True))


@dataclass(frozen=True)
class Row:
    """One line of the table."""

    part: str
    what: str
    state: str
    value: float | None = None
    unit: str = ""
    planned: float | None = None
    note: str = ""

    def cells(self) -> list[str]:
        """The row as cells of a Markdown table."""
        value = "" if self.value is None else f"{self.value:.4g} {self.unit}".strip()
        planned = "" if self.planned is None else f"{self.planned:.4g} {self.unit}".strip()
        return [self.part, self.what, self.state, value, planned, self.note.replace("|", "\\|")]


@dataclass(frozen=True)
class Check:
    """What is run: where, how much of it, and in which folder."""

    device: torch.device
    quick: bool
    folder: Path
    only: tuple[str, ...] = ()

    @property
    def gpu(self) -> bool:
        """Whether this measures a GPU, and not only that the script works."""
        return self.device.type == "cuda"

    @property
    def flags(self) -> list[str]:
        """The options of a process that runs one part."""
        return ["--quick"] * self.quick + ["--cpu"] * (not self.gpu)

    @property
    def base(self) -> str:
        """The base that memory and speed are measured on."""
        return "z-image-turbo" if self.gpu else "miniature-turbo"

    @property
    def edge(self) -> int:
        """Pixels of its images."""
        return 1024 if self.gpu else 32

    @property
    def backend(self) -> str:
        """The compiler: on the CPU one that only traces, since the real one takes minutes."""
        return "inductor" if self.gpu else "eager"

    @property
    def modes(self) -> list[Mode]:
        """The memory modes that are measured."""
        return [mode for mode in ALL_MODES if mode.checkpointing or not self.quick]

    def state(self, good: bool) -> str:
        """Whether a goal for a GPU is reached; on a CPU it is only measured."""
        if not self.gpu:
            return MEASURED
        return PASSED if good else FAILED

    def vault(self) -> Path:
        """A `$MODEL_VAULT` for the random bases of one part, in use from now on."""
        folder = Path(tempfile.mkdtemp(prefix=MODELS, dir=self.folder))
        os.environ |= {"MODEL_VAULT": str(folder), "HF_HUB_OFFLINE": "1"}
        return folder


class HostMemory:
    """The most resident memory of this process within the context; `peak` is in bytes."""

    def __init__(self) -> None:
        self.peak, self._process = 0, psutil.Process()
        self._status = Path("/proc/self/status")

    def __enter__(self) -> "HostMemory":
        try:
            Path("/proc/self/clear_refs").write_text("5")  # the kernel's peak begins again
        except OSError:
            self._status = Path("/nonexistent")
        return self

    def __exit__(self, *_: object) -> None:
        self.peak = self._process.memory_info().rss
        if self._status.is_file():
            for line in self._status.read_text().splitlines():
                if line.startswith("VmHWM:"):
                    self.peak = max(self.peak, int(line.split()[1]) * 1024)


def empty(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.empty_cache()
