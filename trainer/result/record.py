"""What happened in a run, as one object: record.json, meta.json and the report are made of it."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from adapters.files.atomic import atomic_file
from adapters.turbo import TurboAdapter
from trainer.events import as_json
from trainer.learning import Trained, describe_weights
from trainer.monitor import Curves
from trainer.result.meta import bounded, versions
from trainer.result.result_checks import CheckResult
from trainer.result.verdict import Verdict, verdict
from trainer.run_files import PROGRAM, RESULT, files_of
from trainer.settings import Settings


@dataclass(frozen=True)
class Timings:
    """How long the steps of this process took, and the GPU memory that they needed."""

    steps_per_second: float
    peak_gpu_bytes: int | None  # None without a GPU


@dataclass(frozen=True)
class TrainingRecord:
    """Everything about one run that is known when its steps are done, and then its checks."""

    settings: Settings
    dataset: Mapping[str, Any]  # `trainer.result.meta.DatasetFile`
    losses: Sequence[float]  # one per step
    curves: Curves  # validation; empty where nothing was measured
    timings: Timings
    turbo_adapter: Mapping[str, str] | None  # name and sha256
    zero_prior: Mapping[str, float] | None  # None without a token
    device: str
    versions: Mapping[str, str]
    preservation: float | None = None  # the last loss of its rows; None if there were none
    checks: Sequence[CheckResult] = ()  # empty until all are made

    @classmethod
    def of(
        cls,
        settings: Settings,
        dataset: Mapping[str, Any],
        trained: Trained,
        zero_prior: Mapping[str, float] | None,
        adapter: TurboAdapter | None,
        curves: Curves,
    ) -> "TrainingRecord":
        """The record of a run whose steps are done, on this machine."""
        cuda = torch.cuda.is_available()
        peak = torch.cuda.max_memory_allocated() if cuda else None
        return cls(
            settings,
            dataset,
            trained.losses,
            curves,
            Timings(round(trained.steps_per_second, 4), peak),
            {"name": adapter.name, "sha256": adapter.sha256} if adapter else None,
            zero_prior,
            torch.cuda.get_device_name() if cuda else "cpu",
            versions(),
            trained.preservation,
        )

    @property
    def verdict(self) -> Verdict:
        """The class of the result."""
        return verdict(self.checks, validated=bool(self.curves.held_out))

    def meta(self) -> dict[str, Any]:
        """The content of meta.json, small enough to be read back."""
        return bounded(self._facts())

    def plain(self) -> dict[str, Any]:
        """The content of record.json but for the files: meta.json unabridged, losses, timings."""
        facts: dict[str, Any] = as_json(
            self._facts() | {"losses": self.losses, "timings": asdict(self.timings)}
        )
        return facts

    def write(self, folder: Path) -> Path:
        """Writes record.json with the files that the run has written, by their sizes."""
        path = folder / RESULT
        files = sorted(files_of(folder))
        sizes = {file.relative_to(folder).as_posix(): file.stat().st_size for file in files}
        content = {"program": PROGRAM, **self.plain(), "files": sizes}
        with atomic_file(path) as file:
            file.write(json.dumps(content, indent=1).encode())
        return path

    def _facts(self) -> dict[str, Any]:
        settings, losses = self.settings, self.losses
        facts: dict[str, Any] = {
            **describe_weights(settings),
            "turbo_adapter": self.turbo_adapter,
            "settings": shared_settings(settings),
            "dataset": dict(self.dataset),
            "training": {
                "loss_first": _mean(losses[:10]),
                "loss_last": _mean(losses[-10:]),
                "steps_per_second": self.timings.steps_per_second,
                "device": self.device,
            },
            self.curves.kind: self.curves.plain(),  # `fit` where no image was held out
            "versions": dict(self.versions),
        }
        if self.preservation is not None:
            facts["training"]["preservation_last"] = self.preservation
        if self.zero_prior is not None:
            facts |= {
                "placeholder_token_id": self.zero_prior["placeholder_token_id"],
                "placeholder_init_std": settings.placeholder_init_std,
                "zero_prior": self.zero_prior,
            }
        if self.checks:
            checks = [each.plain() for each in self.checks]
            facts |= {"result": self.verdict.result, "checks": checks}
        return facts


def shared_settings(settings: Settings) -> dict[str, Any]:
    """The settings as others may see them: no path of this machine, only names of files."""
    local = {"dataset", "output_dir", "name", "given", "seed_is_random"}  # of one machine
    values = settings.model_dump(exclude={"base", *local}) | {"base": settings.base.name}
    if settings.turbo_adapter not in ("auto", "none", *settings.base.training_adapters):
        values["turbo_adapter"] = Path(settings.turbo_adapter).name
    return {
        name: value.name if isinstance(value, Path) else value for name, value in values.items()
    }


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
