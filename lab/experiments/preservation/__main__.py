"""python -m lab.experiments.preservation: what keeps other prompts as the base model makes them?

screen   trains one subject in every way that was tried, and measures it
study    trains every subject and seed in the ways of the study
report   writes both, a plot and images into docs/preservation.md

Rows are written as they are measured, and one that is there is not trained again.
"""

import argparse
import json
import logging
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from lab.experiments.preservation.measures import Measures
from lab.experiments.preservation.training import train
from lab.experiments.preservation.ways import (
    BASE,
    RENDERED,
    SCREENED,
    STUDIED,
    UNDISTILLED,
    UNDISTILLED_BASE,
    Way,
)
from lab.experiments.table import Row, Table
from miniature.world import SUBJECTS

FOLDER = Path("outputs/preservation")
PUBLISHED = Path(__file__).parent
SCREEN, STUDY = "screen.jsonl", "study.jsonl"
TURBO, SEEDS = "miniature-turbo", range(1, 6)
STEPS = 500


@dataclass(frozen=True)
class Run:
    """One training."""

    way: Way
    base: str
    subject: str
    seed: int

    def key(self, steps: int) -> Row:
        """What tells its row from others."""
        return {"way": self.way.name, "base": self.base, "subject": self.subject,
                "seed": self.seed, "steps": steps}  # fmt: skip


def screened(subject: str, seed: int, names: list[str] | None) -> Iterator[Run]:
    """Every way, or those named, on one subject."""
    for way in SCREENED:
        if not names or way.name in names:
            yield Run(way, TURBO, subject, seed)


def studied() -> Iterator[Run]:
    """Every way, subject and seed; what is decided by it first."""
    for ways, base, seeds in (
        (STUDIED[:2], TURBO, SEEDS),
        (UNDISTILLED, UNDISTILLED_BASE, SEEDS[:1]),
        (STUDIED[2:], TURBO, SEEDS),
    ):
        for seed in seeds:
            for way in ways:
                for subject in SUBJECTS:
                    yield Run(way, base, subject, seed)


def measure(runs: list[Run], table: Table, steps: int, pictures: Path | None) -> None:
    """Trains and measures what the table lacks."""
    instruments: dict[str, Measures] = {}
    for run in runs:
        key = run.key(steps)
        if key in table:
            continue
        if run.base not in instruments:
            instruments[run.base] = Measures(run.base)
        measures = instruments[run.base]
        for name, reference_of in ((BASE, measures.of_base), (RENDERED, measures.of_renderings)):
            reference = {"way": name, "base": run.base, "subject": run.subject, "steps": 0}
            if reference not in table:
                table.add(reference | reference_of(run.subject))
        archive, took = train(run.way, run.base, run.subject, run.seed, steps)
        for scale in (1.0, *run.way.scales):
            for generated_in in (None, *run.way.generated_in):
                way = run.way.name
                way += f" x{scale:g}" * (scale != 1) + f", {generated_in} steps" * bool(
                    generated_in
                )
                strip = None
                if pictures is not None:
                    name = f"{way}-{run.base}-{run.subject}-{run.seed}.png".replace(" ", "_")
                    strip = pictures / name
                scores = measures.of(archive, run.subject, scale, generated_in, strip)
                row = key | {"way": way} | took | scores
                table.add(row)
                print(way, run.subject, run.seed, means(row), flush=True)


def publish(measured: Path, published: Path) -> None:
    """Copies a table; of rows that two processes measured, the first."""
    rows: dict[str, str] = {}
    for line in measured.read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        key = json.dumps([row.get(name) for name in ("way", "base", "subject", "seed", "steps")])
        rows.setdefault(key, line)
    published.write_text("".join(f"{line}\n" for line in rows.values()), encoding="utf-8")


def means(row: dict[str, Any]) -> dict[str, float]:
    """The means of a row's scores, and of the likeness by kind of prompt."""
    like = row["likeness"]
    lists = {name: value for name, value in row.items() if isinstance(value, list)}
    lists |= {"alone": like[::2], "recoloured": like[1::4], "company": like[3::4]}
    found = {name: sum(value) / max(1, len(value)) for name, value in lists.items()}
    found |= {name: row[name] for name in ("prepared_cpu", "cpu") if name in row}
    return {name: round(value, 3) for name, value in found.items()}


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m lab.experiments.preservation",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("command", choices=("screen", "study", "report"))
    parser.add_argument("--part", default="1/1", help="1/2 and 2/2 share the work of two processes")
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--folder", type=Path, default=FOLDER, help="of results (%(default)s)")
    parser.add_argument("--subject", choices=SUBJECTS, default="robot", help="to screen with")
    parser.add_argument("--seed", type=int, default=1, help="to screen with")
    parser.add_argument(
        "--only",
        nargs="*",
        choices=[way.name for way in SCREENED],
        metavar="WAY",
        help="names of ways to screen",
    )
    options = parser.parse_args()
    if options.command == "report":
        from lab.experiments.preservation.report import DOCUMENT, write_report

        for file in (SCREEN, STUDY):
            if (options.folder / file).exists():
                publish(options.folder / file, PUBLISHED / file)
        pictures = options.folder / "pictures"
        write_report(PUBLISHED, pictures if pictures.exists() else None, DOCUMENT)
        return
    torch.set_num_threads(1)  # for models this small, sharing the work out costs more
    logging.disable(logging.WARNING)
    part, parts = map(int, options.part.split("/"))
    file = SCREEN if options.command == "screen" else STUDY
    path = options.folder / file
    path.parent.mkdir(parents=True, exist_ok=True)
    if not path.exists() and (PUBLISHED / file).exists():  # goes on with the published rows
        shutil.copy(PUBLISHED / file, path)
    runs = list(
        screened(options.subject, options.seed, options.only)
        if options.command == "screen"
        else studied()
    )
    pictures = options.folder / "pictures" if options.command == "study" else None
    measure(runs[part - 1 :: parts], Table(path), options.steps, pictures)


if __name__ == "__main__":
    main()
