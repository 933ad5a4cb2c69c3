"""Writes what was measured into docs/preservation.md, between its marks."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from families.registry import BASES, trainable
from lab.experiments.document import rewrite, table
from lab.experiments.preservation.ways import (
    BASE,
    LOSS_FORMS,
    NOTHING,
    PRESERVE,
    RENDERED,
    UNDISTILLED_BASE,
)
from lab.experiments.statistics import Estimate, Values, estimate
from lab.experiments.table import Row, Table
from miniature.world import SUBJECTS
from trainer.memory.plan import Mode
from trainer.memory.plan_table import count
from trainer.settings import TrainingInputs, extent_of, resolve
from trainer.settings.presets import find_preset, steps_for

DOCUMENT = Path(__file__).resolve().parents[3] / "docs" / "preservation.md"
TURBO = "miniature-turbo"
REFERENCES = {RENDERED: "renderings", BASE: "base model"}
FORMS = tuple(way.name for way in LOSS_FORMS)
GENERATED_IN = (", 2 steps", ", 4 steps")


@dataclass(frozen=True)
class Measure:
    """One number of a run."""

    key: str  # in its row
    title: str
    percent: bool = False
    first: int = 0  # of the prompts that count
    every: int = 1

    def of(self, row: Row) -> float:
        """The mean over the run's images."""
        value = row[self.key]
        mean = (
            float(np.mean(value[self.first :: self.every]))
            if isinstance(value, list)
            else float(value)
        )
        return 100 * mean if self.percent else mean

    @property
    def digits(self) -> int:
        return 1 if self.percent else 3


LIKENESS = Measure("likeness", "likeness")
OWN = Measure("own", "other attributes with the subject, %", True)
BESIDE = Measure("beside", "the thing beside it, %", True)
OTHERS = Measure("whole", "other prompts fully right, %", True)
BLEED = Measure("bleed", "bleed, %", True)
MEASURES = (LIKENESS, OWN, BESIDE, OTHERS, BLEED)
KINDS = (
    Measure("likeness", "alone", every=2),
    Measure("likeness", "in another colour", first=1, every=4),
    Measure("likeness", "beside something", first=3, every=4),
)


@dataclass(frozen=True)
class Results:
    """The rows of the study, paired by seed and subject."""

    study: Table

    def ways(self, base: str) -> list[str]:
        """Those with at least one run, in the order of the table."""
        found = dict.fromkeys(row["way"] for row in self.study.find(base=base))
        return [way for way in found if way not in REFERENCES]

    def pairs(self, base: str, *ways: str) -> tuple[list[int], list[str]]:
        """Seeds and subjects for which every way has a run."""
        return self.study.pairs(*({"base": base, "way": way} for way in ways))

    def complete(self, base: str) -> list[str]:
        """Those that have every run of the ways decided by."""
        decided = (NOTHING.name, PRESERVE.name)
        wanted = self.pairs(base, *decided)
        return [way for way in self.ways(base) if self.pairs(base, way, *decided) == wanted]

    def values(
        self, measure: Measure, base: str, way: str, seeds: Sequence[int], subjects: Sequence[str]
    ) -> Values:
        """One number per seed and subject: [seeds, subjects]."""
        return np.array(
            [
                [
                    measure.of(self.study.find(base=base, way=way, seed=seed, subject=subject)[0])
                    for subject in subjects
                ]
                for seed in seeds
            ]
        )

    def mean(self, measure: Measure, base: str, way: str) -> Estimate:
        """Over the seeds and subjects that the ways decided by have, too."""
        return self.over(measure, base, way, self.pairs(base, way, NOTHING.name, PRESERVE.name))

    def over(
        self, measure: Measure, base: str, way: str, pairs: tuple[list[int], list[str]]
    ) -> Estimate:
        """The mean over these seeds and subjects."""
        return estimate(self.values(measure, base, way, *pairs))

    def reference(self, measure: Measure, base: str, way: str) -> float:
        """Of the base model or of renderings, over the subjects."""
        rows = {row["subject"]: row for row in self.study.find(base=base, way=way)}
        return float(np.mean([measure.of(row) for row in rows.values()]))

    def ratio(self, measure: Measure, base: str, way: str) -> Estimate:
        """A way's measure over that of no preservation, paired by seed and subject, %."""
        common = self.pairs(base, way, NOTHING.name)
        over = self.values(measure, base, NOTHING.name, *common)
        return estimate(100 * self.values(measure, base, way, *common) / over)

    def time(self, base: str, way: str) -> float:
        """CPU time of training with what precedes it, relative to no preservation."""
        common = self.pairs(base, way, NOTHING.name)
        total = [
            sum(
                self.values(Measure(key, ""), base, each, *common).sum()
                for key in ("prepared_cpu", "cpu")
            )
            for each in (way, NOTHING.name)
        ]
        return float(total[0] / total[1])


def parts(results: Results, screen: Table) -> dict[str, str]:
    """What was measured, as Markdown, by the document's part."""
    return {
        "answer": answer(results),
        "study": study(results, TURBO),
        "undistilled": study(results, UNDISTILLED_BASE),
        "screen": screened(screen),
        "forms": loss_forms(screen),
    }


def answer(results: Results) -> str:
    """The targets, what was reached, and what was without preservation."""
    base = results.reference(OTHERS, TURBO, BASE)

    def cells(way: str) -> list[str]:
        means = {each: results.mean(each, TURBO, way) for each in MEASURES}
        relative = f"{results.ratio(LIKENESS, TURBO, way).text(1)} %"
        return [
            relative if way != NOTHING.name else "100 %",
            f"{100 * means[OTHERS].mean / base:.1f} %",
            *(f"{means[each].text(1)} %" for each in (OWN, BESIDE, BLEED)),
            f"{results.time(TURBO, way):.2f} ×",
        ]

    asked = [
        ("likeness, relative to no preservation", "≥ 97 %"),
        ("other prompts fully right, relative to the base model", "≥ 90 %"),
        ("other attributes with the subject", "≥ 99.5 %"),
        ("the thing beside it", "≥ 98.5 %"),
        ("bleed", "< 3 %"),
        ("training time", "≤ 1.6 ×"),
    ]
    columns = [cells(way.name) for way in (PRESERVE, NOTHING)]
    rows = [[*each, *found] for each, *found in zip(asked, *columns, strict=True)]
    seeds, subjects = results.pairs(TURBO, PRESERVE.name, NOTHING.name)
    title = f"Preservation on miniature-turbo: {len(subjects)} subjects, {_seeds(seeds)}"
    return table(title, ["", "target", "with", "without"], rows)


def study(results: Results, base: str) -> str:
    """Every way of the study. Ways with fewer runs are in tables of these runs only."""
    if not results.pairs(base, NOTHING.name, PRESERVE.name)[0]:
        return "Not measured yet."
    ways, complete = results.ways(base), results.complete(base)
    tables = compared(results, base, complete)
    if len(complete) < len(ways):
        tables += compared(results, base, ways)
    return "\n\n".join(tables)


def compared(results: Results, base: str, ways: Sequence[str]) -> list[str]:
    """Two tables of these ways, over the runs that all of them have."""
    common = results.pairs(base, *ways)
    rows = [
        [title, *(f"{results.reference(m, base, way):.{m.digits}f}" for m in MEASURES), ""]
        for way, title in REFERENCES.items()
    ]
    for way in ways:
        cells = [results.over(each, base, way, common).text(each.digits) for each in MEASURES]
        rows.append([way, *cells, f"{results.time(base, way):.2f}"])
    kinds = [
        [way, *(results.over(each, base, way, common).text(3) for each in KINDS)] for way in ways
    ]
    seeds, subjects = common
    number = f"{base}: {len(subjects)} subjects, {_seeds(seeds)}"
    titles = [each.title for each in MEASURES]
    return [
        table(number, ["", *titles, "time"], rows),
        table(f"Likeness by kind of prompt, {number}", ["", *(k.title for k in KINDS)], kinds),
    ]


def screened(screen: Table) -> str:
    """Every way that was tried on one seed; without the forms of the loss."""
    rows = [
        [row["way"], row["subject"], *_cells(row)]
        for row in sorted(screen.rows, key=lambda row: -SUBJECTS.index(row["subject"]))
        if row["way"] not in FORMS and not row["way"].endswith(GENERATED_IN)
    ]
    header = ["", "subject", *(each.title for each in MEASURES), *(each.title for each in KINDS)]
    return table("miniature-turbo, seed 1", header, rows)


def loss_forms(screen: Table) -> str:
    """Loss and sampling of sigma, generated in 2, 4 and 8 steps."""
    rows: list[list[str]] = []
    for form in FORMS:
        for steps, way in ((2, f"{form}, 2 steps"), (4, f"{form}, 4 steps"), (8, form)):
            rows += [[form, str(steps), *_cells(row)] for row in screen.find(way=way)]
    if not rows:
        return "Not measured yet."
    header = ["", "steps", *(each.title for each in (*MEASURES, *KINDS))]
    return table("miniature-turbo, robot, seed 1", header, rows)


def costs(bases: Iterable[str] | None = None) -> str:
    """What `preserve: auto` adds to a run of 20 images, by FLOPs."""
    rows = []
    for name in bases or trainable():
        base = BASES[name]
        steps = steps_for(base, find_preset(None), images=20)
        inputs = TrainingInputs(dataset=Path("images.zip"), base_model=name, steps=steps)
        settings = resolve(inputs)
        extent, counted = extent_of(settings), count(settings)
        added = counted.preservation.flops(False)
        plain = counted.flops(Mode()) - added
        images = counted.preservation.images / plain
        pictures = f"{extent.images} of {extent.side} pixels, {extent.steps} steps"
        rows.append(
            [
                name, f"{steps:,}", pictures,
                f"{images:.0f} steps", f"{100 * added / plain:.0f} %",
                f"{1 + added / plain + images / steps:.2f} ×",
            ]
        )  # fmt: skip
    header = [
        "base",
        "steps",
        "images",
        "they take as long as",
        "a step takes longer by",
        "the run",
    ]
    return table("What `preserve: auto` costs", header, rows)


def _seeds(seeds: Sequence[int]) -> str:
    return f"{len(seeds)} seed{'s' * (len(seeds) > 1)}"


def _cells(row: Row) -> list[str]:
    return [f"{each.of(row):.{each.digits}f}" for each in (*MEASURES, *KINDS)]


def write_report(folder: Path, pictures: Path | None, document: Path) -> None:
    """Rewrites the measured parts of the document and its plot from the tables in `folder`.

    The image grid needs the images of the study in `pictures`; without them it stays.
    """
    from lab.experiments.preservation.figures import draw_frontier, draw_pictures

    results, screen = Results(Table(folder / "study.jsonl")), Table(folder / "screen.jsonl")
    images = rewrite(document, parts(results, screen) | {"costs": costs()})
    draw_frontier(results, screen, images / "preservation_frontier.png")
    if pictures is not None:
        draw_pictures(pictures, images / "preservation_pictures.png")
