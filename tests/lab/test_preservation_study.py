"""The study of preservation: every way trains, and the document has the tables' numbers."""

from dataclasses import replace
from itertools import product
from pathlib import Path

import pytest
import torch

from lab.experiments.preservation.__main__ import PUBLISHED, SCREEN, SEEDS, STUDY, measure, studied
from lab.experiments.preservation.__main__ import Run as StudyRun
from lab.experiments.preservation.prompts import anchor_prompts, other_prompts, plain
from lab.experiments.preservation.report import DOCUMENT, TURBO, Results, costs, parts
from lab.experiments.preservation.training import train
from lab.experiments.preservation.ways import (
    BASE,
    NOTHING,
    PRESERVE,
    RENDERED,
    SCREENED,
    STUDIED,
    Way,
)
from lab.experiments.table import Table
from miniature.lexicon import COLOURS, SHAPES
from miniature.world import SUBJECTS

# One of each kind, and of each thing that only some ways do.
KINDS = {
    each.name: each
    for each in (
        Way("flow", "flow", 0.1),
        Way("match", "match", 0.1, mix=0.5, without_adapter=True),
        Way("path", "path", 0.1, project=True),
        Way("own", "path", 0.1, own=True, swapped=0.5, plain=0.5, every=2),
        Way("penalty", penalty=0.1),
        Way("guided", guided=0.5),
        Way(
            "anchors", "path", 0.5, own=True, begins=0.3, anchors=4, anchored=0.5, anchor_scale=0.8
        ),
        PRESERVE,
    )
}


def test_a_plain_prompt_names_no_colour() -> None:
    assert plain("an orange heart in a green field") == "a heart in a field"
    assert plain("a red box next to an orange oval") == "a box next to an oval"
    way = Way("", plain=1.0)
    words = {word for names in COLOURS.values() for word in names}
    assert not any(words & set(prompt.split()) for prompt in other_prompts(way, ["a <zwx>"]))


def test_swapped_prompts_hold_another_noun_in_place_of_the_token() -> None:
    prompts = other_prompts(Way("", swapped=0.5, prompts=8), ["a <zwx> in the snow"])
    assert len(prompts) == 8 and not any("<zwx>" in prompt for prompt in prompts)
    assert sum(prompt.endswith("in the snow") for prompt in prompts) >= 4


def test_anchors_name_the_subject_once_and_some_of_them_something_beside_it() -> None:
    prompts = anchor_prompts(12, 4)
    assert len(set(prompts)) == 12 and all(each.count("<zwx>") == 1 for each in prompts)
    shapes = {word for names in SHAPES.values() for word in names}
    beside = [bool(shapes & set(each.split())) for each in prompts]
    assert beside == [False] * 8 + [True] * 4


@pytest.mark.slow
@pytest.mark.parametrize("name", KINDS)
def test_every_way_trains_a_lora(name: str) -> None:
    """And ways with rows another one than no preservation, from the same seed."""
    way = replace(KINDS[name], prompts=4)
    archive, took = train(way, TURBO, "robot", seed=1, steps=3)
    assert all(up.any() for _, up in archive.factors.values()) and took["cpu"] > 0
    plain_archive, _ = train(replace(way, kind="none", penalty=0.0, guided=0.0,
                                     settings=way.settings | {"preserve": "off"}),
                             TURBO, "robot", seed=1, steps=3)  # fmt: skip
    layer = next(iter(archive.factors))
    assert not torch.equal(archive.factors[layer][1], plain_archive.factors[layer][1])


@pytest.mark.slow
def test_a_row_that_is_there_is_not_measured_again(tmp_path: Path) -> None:
    table = Table(tmp_path / "table.jsonl")
    runs = [StudyRun(Way("nothing"), TURBO, "robot", 1)]
    measure(runs, table, steps=1, pictures=tmp_path)
    assert [row["way"] for row in table.rows] == ["base", "renderings", "nothing"]
    assert len(list(tmp_path.glob("*.png"))) == 1
    measure(runs, Table(table.path), steps=1, pictures=tmp_path)
    assert len(Table(table.path).rows) == 3


def test_the_study_has_every_subject_and_seed_and_no_run_twice() -> None:
    planned = {(run.way.name, run.subject, run.seed) for run in studied() if run.base == TURBO}
    assert planned == set(product((way.name for way in STUDIED), SUBJECTS, SEEDS))
    published = Table(PUBLISHED / STUDY)
    for way in (NOTHING, PRESERVE):
        found = [(row["subject"], row["seed"]) for row in published.find(base=TURBO, way=way.name)]
        assert len(set(found)) == len(found) > 0


def test_every_screened_row_is_of_a_way_that_is_there() -> None:
    names = {way.name for way in SCREENED}
    for row in Table(PUBLISHED / SCREEN).rows:
        if row["way"] not in (BASE, RENDERED):
            assert any(row["way"].startswith(name) for name in names)


def test_every_figure_of_the_document_comes_from_the_published_tables() -> None:
    text = DOCUMENT.read_text(encoding="utf-8")
    results = Results(Table(PUBLISHED / STUDY))
    for part in parts(results, Table(PUBLISHED / SCREEN)).values():
        assert part in text


def test_the_costs_in_the_document_are_the_plans() -> None:
    text = DOCUMENT.read_text(encoding="utf-8")
    assert costs(["miniature-turbo"]).splitlines()[-1] in text
