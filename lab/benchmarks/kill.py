"""python -m lab.benchmarks.kill: interrupts runs at random moments and reports what they lose.

One run on the embedded miniature is left alone. The same run is then disturbed once: by SIGKILL, by
SIGTERM, by SIGTERM twice, by a full disk, by a pretended out-of-memory error, or by previews that
fail; while it prepares, trains, saves, checks or writes. Where it has ended, it is resumed. At its
end its weights must equal those of the run that was left alone, bit for bit, and no step may have
been done twice; after SIGKILL only those since the last checkpoint. Nothing of a run may be left
behind: no process, no partial file. And nothing of others may be touched.
"""

import argparse
import hashlib
import multiprocessing
import os
import random
import shutil
import signal
import sys
import tempfile
import time
import traceback
import zipfile
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from io import BytesIO
from itertools import count
from pathlib import Path
from typing import Any

import torch
import yaml
from PIL import Image

from adapters.archive import Archive, read_archive
from lab.benchmarks.small_disk import fill, small_disk
from trainer.learning.checkpoint import latest, read_checkpoint

STEPS, EVERY = 6, 2
DISK = 12 << 20  # bytes, where the disk fills up
TRAIN = {
    "train_placeholder_token": True,
    "resolution": "64",
    "rank": 2,
    "batch_size": 1,
    "steps": STEPS,
    "seed": 11,
    "caption_dropout": 0.3,
    "ema_decay": 0.9,
    "checkpoint_every": EVERY,
    "validation_every": 3,
}
SAMPLE = {"prompts": ["<zwx>"], "every": 2, "width": 32, "height": 32, "num_inference_steps": 1}

# What is called in each phase. A run is disturbed right before one of these calls.
PHASES = {
    "preparing": (
        "trainer.run.encode_images",
        "trainer.run.Captions",
        "trainer.run.Lora",
        "trainer.run.Validation",
        "trainer.run.Loop",
    ),
    "training": (
        "trainer.learning.loop.flow_loss",
        "trainer.learning.loop.Loop.batch",
        "trainer.learning.step_report.StepReport.show",
    ),
    "saving": (
        "trainer.learning.saving.write_checkpoint",
        "trainer.learning.checkpoint.save_file",
        "trainer.learning.checkpoint._save",
    ),
    "checking": (
        "trainer.result.result_checks.learned",
        "trainer.result.result_checks.reloads",
        "trainer.result.evaluation.load_family",
        "trainer.result.evaluation.velocity_drift",
        "trainer.result.evaluation.generate",
    ),
    "writing": (
        "trainer.run.TrainingRecord.of",
        "trainer.result.evaluation.write_archive",
        "trainer.result.evaluation.report.write_report",
        "trainer.run.write_weights",
    ),
}
PREVIEWS = (
    "trainer.monitor.previews.generate",
    "trainer.monitor.inference_weights.LoraMerger",
    "trainer.monitor.preview_images.save_png",
    "trainer.monitor.preview_images.make_sheet",
)
KINDS = ("SIGKILL", "SIGTERM", "SIGTERM twice", "full disk", "out of memory", "broken preview")


@dataclass(frozen=True)
class Blow:
    """One disturbance: its kind, and before which call of what it comes."""

    kind: str
    phase: str
    place: str  # of a function
    call: int  # the first is 0


@dataclass
class Outcome:
    """What one disturbed run has come to."""

    blow: Blow
    struck: bool  # else the run had ended before
    again: int  # steps that were done twice
    faults: list[str]


def random_blow(kind: str, phase: str, chance: random.Random) -> Blow:
    """A random moment of a phase."""
    place = chance.choice(PREVIEWS if kind == "broken preview" else PHASES[phase])
    calls = {"training": STEPS, "saving": 3, "checking": 1, "writing": 2}.get(phase, 1)
    return Blow(kind, phase, place, chance.randrange(3 if kind == "broken preview" else calls))


class Trial:
    """One run in folders of its own, with a neighbour that must not be touched."""

    def __init__(self, folder: Path, context: Any) -> None:
        self.folder, self._context = folder, context
        self.output, self.steps = folder / "run", folder / "steps.txt"
        self.left_behind: list[str] = []
        for file in ("neighbour/weights.zip", "neighbour/checkpoints/step-000009.safetensors"):
            (folder / file).parent.mkdir(parents=True, exist_ok=True)
            (folder / file).write_bytes(b"of another run")
        (folder / "notes.txt").write_text("of a person")
        self.before = self._others()
        write_pictures(folder / "pictures.zip")

    def go(self, blow: Blow | None) -> int:
        """One process: a new run, or the same resumed where it has a checkpoint."""
        train: dict[str, Any] = dict(TRAIN)
        if latest(self.output / "checkpoints") is not None:
            train["resume_from"] = str(self.output / "checkpoints")
        elif self.output.exists():  # ended before its first checkpoint: another run begins anew
            self.output = self.output.with_name(f"{self.output.name}-again")
        config = self.folder / "run.yaml"
        values = {"dataset": str(self.folder / "pictures.zip"), "train": train, "sample": SAMPLE}
        config.write_text(yaml.safe_dump({"base_model": "miniature-turbo", **values}))
        arguments = (config, self.output, self.folder, blow)
        process = self._context.Process(target=_train, args=arguments)
        process.start()
        process.join(300)
        if process.is_alive():
            process.kill()
            self.left_behind.append("a run that does not end")
        process.join()
        self.left_behind += [f"process {each}" for each in _session(process.pid)]
        return int(process.exitcode)

    def faults(self, wanted: dict[str, torch.Tensor]) -> list[str]:
        """What is wrong when the run has ended."""
        found = [f"{each} is left" for each in self.left_behind]
        parts = [*self.output.rglob("*.part"), *self.output.glob("*unchecked*")]
        found += [f"{each.name} is left" for each in parts]
        found += ["files of others were touched"] * (self._others() != self.before)
        for file in (self.output / "checkpoints").glob("step-*"):
            (read_archive if file.suffix == ".zip" else read_checkpoint)(file)
        got = learned(read_archive(self.output / "weights.zip"))
        same = got.keys() == wanted.keys() and all(torch.equal(got[k], wanted[k]) for k in got)
        return found + ["the weights differ"] * (not same)

    def again(self) -> int:
        """How many steps were done twice."""
        done = Counter(self.steps.read_text().split()) if self.steps.exists() else Counter()
        return sum(number - 1 for number in done.values())

    def _others(self) -> dict[str, str]:
        files = [self.folder / "notes.txt", *(self.folder / "neighbour").rglob("*")]
        return {
            str(each): hashlib.sha256(each.read_bytes()).hexdigest()
            for each in files
            if each.is_file()
        }


def _session(leader: int) -> list[int]:
    """The processes of a session, which a run is."""
    found = []
    for status in Path("/proc").glob("[0-9]*/stat"):
        try:
            after_name = status.read_text().rpartition(")")[2].split()
        except OSError:  # it has ended
            continue
        if int(after_name[3]) == leader and after_name[0] != "Z":
            found.append(int(status.parent.name))
    return found


def _train(config: Path, output: Path, folder: Path, blow: Blow | None) -> None:
    """`python -m trainer CONFIG --output_dir OUTPUT`, in a process that is this function's own."""
    from trainer.__main__ import main
    from trainer.learning.loop import Loop

    os.setsid()
    with (folder / "log.txt").open("ab") as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
    os.environ.pop("MODEL_VAULT", None)
    torch.set_num_threads(1)
    step = Loop.step

    def counted(self: Loop, number: int) -> None:
        step(self, number)
        with (folder / "steps.txt").open("a") as file:
            file.write(f"{number}\n")

    setattr(Loop, "step", counted)  # noqa: B010
    sys.argv = ["trainer", str(config), "--output_dir", str(output)]
    with ExitStack() as until_the_end:
        if blow is not None:
            _prepare(blow, output, folder / "struck.txt")
        if blow is not None and blow.kind == "full disk":
            # The disk is this process's alone: what is on it is copied when the run has ended.
            disk = folder / "disk"
            sys.argv[-1] = str(disk / "run")
            until_the_end.enter_context(small_disk(disk, DISK))
            until_the_end.callback(_copy, disk / "run", output)
        main()


def _copy(source: Path, target: Path) -> None:
    if source.is_dir():
        shutil.copytree(source, target)


def _prepare(blow: Blow, output: Path, struck: Path) -> None:
    """Has the blow come before the call that it names."""
    owner_name, _, name = blow.place.rpartition(".")
    owner = _find(owner_name)
    original, calls = getattr(owner, name), count()

    def struck_before(*arguments: Any, **options: Any) -> Any:
        if next(calls) == blow.call:
            struck.write_text(blow.kind)
            _STRIKES[blow.kind](output)
        return original(*arguments, **options)

    setattr(owner, name, struck_before)


def _find(path: str) -> Any:
    """A module, or what is in one."""
    parts = path.split(".")
    found = __import__(parts[0])
    for number, part in enumerate(parts[1:], start=2):
        if not hasattr(found, part):
            __import__(".".join(parts[:number]))
        found = getattr(found, part)
    return found


def _terminate_twice(_: Path) -> None:
    """A second SIGTERM comes when the state is being written."""
    from trainer.learning import checkpoint

    save = checkpoint._save

    def disturbed(*arguments: Any) -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        save(*arguments)

    setattr(checkpoint, "_save", disturbed)  # noqa: B010
    os.kill(os.getpid(), signal.SIGTERM)


def _fill(output: Path) -> None:
    fill(output.parent / "disk")


def _out_of_memory(_: Path) -> None:
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB (pretended)")


def _break(_: Path) -> None:
    raise RuntimeError("a preview that fails (pretended)")


_STRIKES: dict[str, Callable[[Path], None]] = {
    "SIGKILL": lambda _: os.kill(os.getpid(), signal.SIGKILL),
    "SIGTERM": lambda _: os.kill(os.getpid(), signal.SIGTERM),
    "SIGTERM twice": _terminate_twice,
    "full disk": _fill,
    "out of memory": _out_of_memory,
    "broken preview": _break,
}


def write_pictures(path: Path, seed: str = "") -> Path:
    """A zip of four small images, the same every time."""
    chance = random.Random(f"{seed} 5")
    with zipfile.ZipFile(path, "w") as archive:
        for number in range(4):
            content = BytesIO()
            Image.frombytes("RGB", (64, 64), chance.randbytes(3 * 64 * 64)).save(content, "PNG")
            archive.writestr(f"{number}.png", content.getvalue())
    return path


def learned(archive: Archive) -> dict[str, torch.Tensor]:
    """Every tensor of the archive."""
    tensors = dict(archive.vectors)
    for name, (down, up) in archive.factors.items():
        tensors |= {f"{name}.down": down, f"{name}.up": up}
    return tensors


def kill(moments: int, seed: int, folder: Path, jobs: int = 1) -> list[Outcome]:
    """Disturbs so many runs in every way, in every phase by turns."""
    context = multiprocessing.get_context("forkserver")
    # One process imports the libraries, and each run is a fork of it.
    context.set_forkserver_preload(["trainer.run", "trainer.__main__"])
    whole = Trial(folder / "whole", context)
    if whole.go(None) != 0:
        raise RuntimeError((whole.folder / "log.txt").read_text())
    wanted = learned(read_archive(whole.output / "weights.zip"))
    chance, phases = random.Random(seed), [*PHASES]
    blows = [
        random_blow(kind, phases[number % len(phases)], chance)
        for number in range(moments)
        for kind in KINDS
    ]

    def disturbed(numbered: tuple[int, Blow]) -> Outcome:
        number, blow = numbered
        trial = Trial(folder / f"{number:04d}", context)
        faults = []
        try:
            code = trial.go(blow)
            ended = blow.kind in ("SIGKILL", "SIGTERM", "SIGTERM twice")
            refused = blow.kind == "full disk" and not trial.steps.exists()  # before it began
            if code != 0 and not ended and not refused:
                faults.append(f"exit code {code}")
            if code != 0 and trial.go(None) != 0:
                faults.append("it cannot be resumed")
            faults += trial.faults(wanted)
        except Exception:
            faults.append(traceback.format_exc(limit=-1))
        again = trial.again()
        if again > (EVERY if blow.kind == "SIGKILL" else 0):
            faults.append(f"{again} steps were lost")
        struck = (trial.folder / "struck.txt").exists()
        if not faults:
            shutil.rmtree(trial.folder)
        return Outcome(blow, struck, again, faults)

    with ThreadPoolExecutor(jobs) as workers:
        return [*workers.map(disturbed, enumerate(blows))]


def table(outcomes: list[Outcome]) -> str:
    """One row for each kind of disturbance."""
    lines = [f"{'':15}{'runs':>6}{'struck':>8}{'steps done twice':>18}{'violations':>12}"]
    for kind in KINDS:
        of = [each for each in outcomes if each.blow.kind == kind]
        struck, again = sum(each.struck for each in of), sum(each.again for each in of)
        broken = sum(bool(each.faults) for each in of)
        lines.append(f"{kind:15}{len(of):6}{struck:8}{again:18}{broken:12}")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--moments", type=int, default=50, help="of each kind of disturbance")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time")
    options = parser.parse_args()
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        outcomes = kill(options.moments, options.seed, Path(folder), options.jobs)
    print(table(outcomes))
    for each in outcomes:
        for fault in each.faults:
            print(f"{each.blow}: {fault}")
    print(f"{time.perf_counter() - start:.0f} s")
    sys.exit(any(each.faults for each in outcomes))


if __name__ == "__main__":
    main()
