"""python -m benchmarks.kill: trainings that are killed again and again, and what they lose by it.

One training on the embedded miniature runs undisturbed. The same training is then killed at random
moments, by SIGTERM, by SIGKILL, and in the middle of writing a file, and each time goes on from
what it finds. In the end it must have learned the same, bit for bit.
"""

import argparse
import multiprocessing
import os
import random
import signal
import sys
import tempfile
import zipfile
from collections import Counter
from dataclasses import dataclass
from io import BytesIO
from itertools import count
from pathlib import Path
from typing import Any

import torch
import yaml
from PIL import Image

from adapters.archive import Archive, read_archive
from trainer.checkpoint import latest, read_checkpoint

TRAIN = {
    "train_placeholder_token": True,
    "resolution": "64",
    "rank": 2,
    "batch_size": 1,
    "seed": 11,
    "caption_dropout": 0.3,
    "ema_decay": 0.9,
    "checkpoint_every": 1,
    "validation_every": 0,
}
# SIGKILL at an early call of one of these is in the middle of writing: before a file's content is
# on the disk, or before it gets its name.
WRITING = ("fsync", "replace")
WAYS = ("SIGTERM", "SIGKILL", *WRITING)


@dataclass
class Report:
    """What the kills did."""

    kills: Counter[str]
    abandoned: int = 0  # half-written files that were found after a kill
    left: int = 0  # of them at the end
    same: bool = False  # as without a kill, bit for bit


class Trainings:
    """Processes of one training, one after the other, each going on where the last one stopped."""

    def __init__(self, folder: Path, steps: int) -> None:
        folder.mkdir()
        self.steps = steps
        self.folder, self.output = folder, folder / "0"
        # One process imports the libraries, and each training is a fork of it.
        self._context = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload(["trainer.run"])

    @property
    def checkpoints(self) -> Path:
        return self.output / "checkpoints"

    def start(self, dies_at: tuple[str, int] | None = None) -> Any:
        """The next process."""
        train: dict[str, Any] = {**TRAIN, "steps": self.steps}
        if latest(self.checkpoints) is not None:
            train["resume_from"] = str(self.checkpoints)
        elif self.output.exists():  # killed before its first checkpoint: another run begins anew
            self.output = self.folder / str(int(self.output.name) + 1)
        dataset = write_pictures(self.folder / "pictures.zip")
        config = self.folder / "run.yaml"
        values = {"base_model": "miniature-turbo", "dataset": str(dataset), "train": train}
        config.write_text(yaml.safe_dump(values))
        arguments = (config, self.output, self.folder / "log.txt", dies_at)
        process = self._context.Process(target=_train, args=arguments)
        process.start()
        return process

    def check(self) -> None:
        """Raises `BrokenCheckpoint` for a checkpoint that is not whole."""
        for file in self.checkpoints.glob("step-*"):
            read_checkpoint(file)

    def newest(self) -> str:
        """The name of the newest checkpoint."""
        return max((file.name for file in self.checkpoints.glob("step-*")), default="")

    def parts(self) -> list[Path]:
        """Files of the run that are half written."""
        return list(self.output.rglob("*.part"))

    def finish(self) -> Archive:
        """What a last process, which nobody disturbs, makes of it."""
        process = self.start()
        process.join()
        if process.exitcode != 0:
            raise RuntimeError((self.folder / "log.txt").read_text())
        return read_archive(self.output / "weights.zip")


def _train(config: Path, folder: Path, said: Path, dies_at: tuple[str, int] | None) -> None:
    """`python -m trainer CONFIG --output_dir FOLDER`, in a process that is this function's own."""
    from trainer.__main__ import main

    with said.open("ab") as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
    os.environ.pop("MODEL_VAULT", None)
    torch.set_num_threads(1)
    if dies_at is not None:
        name, last = dies_at
        original, calls = getattr(os, name), count()

        def die(*arguments: Any) -> Any:
            if next(calls) == last:
                os.kill(os.getpid(), signal.SIGKILL)
            return original(*arguments)

        setattr(os, name, die)
    sys.argv = ["trainer", str(config), "--output_dir", str(folder)]
    main()


def write_pictures(path: Path, seed: str = "") -> Path:
    """A zip of four small pictures, the same every time."""
    chance = random.Random(f"{seed} 5")
    with zipfile.ZipFile(path, "w") as archive:
        for number in range(4):
            content = BytesIO()
            Image.frombytes("RGB", (64, 64), chance.randbytes(3 * 64 * 64)).save(content, "PNG")
            archive.writestr(f"{number}.png", content.getvalue())
    return path


def learned(archive: Archive) -> dict[str, torch.Tensor]:
    """Every tensor of the archive."""
    placeholder = archive.placeholder
    tensors = {placeholder.token: placeholder.vectors} if placeholder is not None else {}
    for name, (down, up) in archive.factors.items():
        tensors |= {f"{name}.down": down, f"{name}.up": up}
    return tensors


def kill(kills: int, seed: int, folder: Path) -> Report:
    """Kills a training so many times, in every way by turns."""
    steps = max(12, 5 * kills)  # no kill may come after the end
    wanted = learned(Trainings(folder / "whole", steps).finish())
    trainings, chance = Trainings(folder / "killed", steps), random.Random(seed)
    report = Report(Counter())
    for number in range(kills):
        way, before = WAYS[number % len(WAYS)], trainings.newest()
        if way in WRITING:
            process = trainings.start((way, chance.randrange(3)))
            process.join()
        else:
            process = trainings.start()
            while process.is_alive() and trainings.newest() == before:
                process.join(0.01)
                if chance.random() < 0.01:  # some are killed before their first checkpoint
                    break
            process.join(chance.uniform(0, 0.1))
            os.kill(process.pid, getattr(signal, way))
            process.join()
        if process.exitcode not in (-signal.SIGKILL, -signal.SIGTERM, 128 + signal.SIGTERM):
            raise RuntimeError((trainings.folder / "log.txt").read_text())
        trainings.check()
        report.kills[way] += 1
        report.abandoned += len(trainings.parts())
    got = learned(trainings.finish())
    report.left = len(trainings.parts())
    report.same = got.keys() == wanted.keys() and all(torch.equal(got[k], wanted[k]) for k in got)
    return report


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=40)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        found = kill(options.kills, options.seed, Path(folder))
    print(", ".join(f"{count} by {way}" for way, count in found.kills.items()))
    print(f"{found.abandoned} files half written, {found.left} of them there at the end")
    print("the same as undisturbed" if found.same else "NOT the same as undisturbed")
    sys.exit(not found.same or found.left > 0)


if __name__ == "__main__":
    main()
