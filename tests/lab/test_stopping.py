"""The document's figures on when to stop are those that were measured."""

from root import ROOT

from lab.experiments.stopping.__main__ import PUBLISHED, RUNS
from lab.experiments.table import Row, Table
from trainer.learning.best_weights import PATIENCE, why_ended
from trainer.settings import TrainingInputs, resolve

# Steps of each run, and likeness at the lowest loss and where early_stopping ends, of the last.
SAID = {"default": (500, ["71%", "95%"]), "twice as long": (1000, ["82%", "100%"])}


def rows(run: str) -> list[Row]:
    return Table(PUBLISHED).find(run=run)


def mean(values: list[float]) -> float:
    return sum(values) / len(values)


def test_the_tables_of_the_document_are_the_published_rows() -> None:
    document = (ROOT / "docs" / "training.md").read_text(encoding="utf-8")
    for name, *_ in RUNS:
        found = [row for row in rows(name) if name != "default" or row["step"] not in (250, 350)]
        found = [row for row in found if row["step"] != 450]
        base = f"{mean(found[0]['base']):.2f}"
        for title, first, cells in (
            ("validation loss", base, [f"{mean(row['held_out']):.2f}" for row in found]),
            ("loss on 40 other images of the subject", "",
             [f"{mean(row['fresh']):.2f}" for row in found]),
            ("likeness to the subject", "", [f"{row['likeness']:.2f}" for row in found]),
            ("other prompts all correct", "", [f"{row['others_right']:.0%}".replace("%", " %")
                                               for row in found]),
        ):  # fmt: skip
            line = " | ".join([f"| {title} ", *([first] if first else [""]), *cells, ""]).rstrip()
            assert " ".join(line.split()) in " ".join(document.split()), line


def test_the_lowest_loss_is_early_and_where_that_of_many_images_is() -> None:
    for run, (steps, said) in SAID.items():
        found = rows(run)
        lowest = min(found, key=lambda row: mean(row["held_out"]))
        assert lowest is min(found, key=lambda row: mean(row["fresh"])) is found[0]
        settings = resolve(
            TrainingInputs(
                dataset="a.zip", base_model="miniature-turbo", steps=steps, early_stopping=True
            )
        )
        losses = [mean(found[0]["base"]), *(mean(row["held_out"]) for row in found)]
        at = [0, *(row["step"] for row in found)]
        ends = next(k for k in range(2, len(at)) if why_ended(at[:k], losses[:k], settings)) - 1
        assert at[ends] == lowest["step"] + max(PATIENCE * steps, 3 * at[1])
        last = found[-1]["likeness"]
        shares = [row["likeness"] / last for row in (lowest, found[ends - 1])]
        assert [f"{share:.0%}" for share in shares] == said
