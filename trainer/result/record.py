"""The record of a run, the source of record.json, meta.json and the report."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from adapters.files.atomic import atomic_file
from adapters.turbo import TurboAdapter
from families.device import device_name, peak_bytes
from families.loading import default_device
from trainer.events import as_json
from trainer.learning import Trained, describe_weights
from trainer.monitor import Curves
from trainer.result.meta import bounded, versions
from trainer.result.result_checks import CheckResult
from trainer.result.verdict import Verdict, verdict
from trainer.run_files import PROGRAM, RESULT, files_of, files_of_model
from trainer.settings import Settings


@dataclass(frozen=True)
class Timings:
    """Speed and peak GPU memory of the steps of this process."""

    steps_per_second: float
    peak_gpu_bytes: int | None  # None without a GPU
    phases: Mapping[str, float] = field(default_factory=dict)  # seconds, from the start to the end


@dataclass(frozen=True)
class TrainingRecord:
    """All data of one run after its last step; `checks` are added later."""

    settings: Settings
    dataset: Mapping[str, Any]  # `trainer.result.meta.DatasetFile`
    losses: Sequence[float]  # one per step
    curves: Curves  # validation loss; empty if not measured
    timings: Timings
    turbo_adapter: Mapping[str, str] | None  # name and sha256
    zero_priors: Sequence[Mapping[str, float]]  # one for each token
    device: str
    versions: Mapping[str, str]
    preservation: float | None = None  # the last loss of its rows; None if there were none
    ended_early: str = ""  # the reason, with early_stopping
    checks: Sequence[CheckResult] = ()  # empty until all are done

    @classmethod
    def of(
        cls,
        settings: Settings,
        dataset: Mapping[str, Any],
        trained: Trained,
        zero_priors: Sequence[Mapping[str, float]],
        adapter: TurboAdapter | None,
        curves: Curves,
    ) -> "TrainingRecord":
        """The record of a run after its last step, on this machine."""
        device = default_device()
        return cls(
            settings,
            dataset,
            trained.losses,
            curves,
            Timings(round(trained.steps_per_second, 4), peak_bytes(device)),
            {"name": adapter.name, "sha256": adapter.sha256} if adapter else None,
            zero_priors,
            device_name(device),
            versions(),
            trained.preservation,
            trained.ended_early,
        )

    @property
    def verdict(self) -> Verdict:
        """The verdict on the result."""
        return verdict(self.checks, validated=bool(self.curves.held_out))

    def meta(self) -> dict[str, Any]:
        """The content of meta.json, limited in size."""
        return bounded(self._facts())

    def plain(self) -> dict[str, Any]:
        """The content of record.json without `files`: full meta.json, losses, timings."""
        facts: dict[str, Any] = as_json(
            self._facts() | {"losses": self.losses, "timings": asdict(self.timings)}
        )
        return facts

    def write(self, folder: Path) -> Path:
        """Writes record.json, including the run's files and their sizes."""
        path = folder / RESULT
        files = [*sorted(files_of(folder)), *files_of_model(folder)]
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
            self.curves.kind: self.curves.plain(),  # `fit` without held-out images
            "versions": dict(self.versions),
        }
        if self.curves.shipped is not None:
            facts["shipped_step"] = self.curves.shipped
        if self.ended_early:
            facts["ended_early"] = self.ended_early
        if self.preservation is not None:
            facts["training"]["preservation_last"] = self.preservation
        if self.zero_priors:
            facts |= {
                "placeholder_token_id": self.zero_priors[0]["placeholder_token_id"],
                "placeholder_init_std": settings.placeholder_init_std,
                "zero_prior": self.zero_priors[0],
            }
        if len(self.zero_priors) > 1:
            facts["zero_priors"] = dict(zip(settings.tokens, self.zero_priors, strict=True))
        if self.checks:
            checks = [each.plain() for each in self.checks]
            found = self.verdict
            numbers = [each.plain() for each in found.headlines]
            facts |= {"result": found.result, "headlines": numbers, "checks": checks}
        return facts


def shared_settings(settings: Settings) -> dict[str, Any]:
    """The settings without local paths, for sharing; files by name only."""
    # Specific to this machine.
    local = {"dataset", "controls", "output_dir", "name", "given", "seed_is_random"}
    values = settings.model_dump(exclude={"base", *local}) | {"base": settings.base.name}
    if settings.turbo_adapter not in ("auto", "none", *settings.base.training_adapters):
        values["turbo_adapter"] = Path(settings.turbo_adapter).name
    return {
        name: value.name if isinstance(value, Path) else value for name, value in values.items()
    }


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
