"""Experiments: their instruments measure what they say, and their small versions run."""

import json
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageFilter, ImageOps

from adapters.archive import Archive, read_archive
from adapters.lora import Lora
from adapters.placeholder import Placeholder
from demo.subject import SUBJECT
from inference.engine import Engine
from inference.request import Request
from lab.experiments import measures
from lab.experiments.document import marks
from lab.experiments.drawing import Drawer, Way
from lab.experiments.prompts import class_prompts, free_prompts, subject_prompts
from lab.experiments.statistics import estimate
from lab.experiments.table import Table
from lab.experiments.turbo_retention.__main__ import PUBLISHED
from lab.experiments.turbo_retention.design import CONDITIONS, SMALL, TURBO, WORD
from lab.experiments.turbo_retention.merge import inversion_errors
from lab.experiments.turbo_retention.report import DOCUMENT, parts, write_report
from lab.experiments.turbo_retention.results import Results
from lab.experiments.turbo_retention.study import RESULTS, Study
from lab.experiments.turbo_retention.training import training_adapter
from lab.experiments.zero_prior.__main__ import PUBLISHED as ZERO_PRIOR_PUBLISHED
from lab.experiments.zero_prior.captions import TEMPLATES, make_captions, template_of
from lab.experiments.zero_prior.compare import Results as ZeroPriorResults
from lab.experiments.zero_prior.compare import compare, metrics
from lab.experiments.zero_prior.design import CHOICES, CLASS_WORDS, POINTS, SEEDS, Size
from lab.experiments.zero_prior.design import CONDITIONS as WORDS
from lab.experiments.zero_prior.design import SMALL as ZERO_PRIOR_SMALL
from lab.experiments.zero_prior.figures import draw_choices, draw_metrics, draw_pictures
from lab.experiments.zero_prior.metrics import WORLD
from lab.experiments.zero_prior.report import DOCUMENT as ZERO_PRIOR_DOCUMENT
from lab.experiments.zero_prior.report import parts as zero_prior_parts
from lab.experiments.zero_prior.study import UNTRAINED
from lab.experiments.zero_prior.study import Study as ZeroPriorStudy
from lab.experiments.zero_prior.world import World
from miniature.drawing import render
from miniature.images import to_tensor
from miniature.world import SUBJECTS, evaluation_prompts

EIGHT = Way("8 steps", 8)


@pytest.fixture(scope="module")
def drawer() -> Drawer:
    return Drawer(TURBO)


@pytest.fixture(scope="module")
def archive(drawer: Drawer) -> Archive:
    """A LoRA that changes pictures visibly, and a placeholder."""
    family = drawer.family
    lora = Lora(family.transformer, family.lora_targets(), 2, seed=0)
    random = torch.Generator().manual_seed(0)
    factors = {
        name: (down, torch.randn(up.shape, generator=random) / 10)
        for name, (down, up) in lora.deltas().items()
    }
    lora.remove()
    placeholder = Placeholder.create(WORD, family.text_width, std=0.1, seed=0)
    return Archive(factors, (placeholder.detached(),), {"base_model": family.base.hub_id})


# The instruments.


def test_the_experiments_draw_what_a_prediction_draws(drawer: Drawer, archive: Archive) -> None:
    """The same picture but for bfloat16 products; another LoRA draws another one."""
    prompt = subject_prompts(SUBJECT, WORD, 1)[0]
    ours = to_tensor(drawer.draw(archive, [prompt], EIGHT))
    engine = Engine(torch.device("cpu"), torch.float32)
    request = Request(prompt=prompt.text, seed=prompt.seed)
    theirs = to_tensor(engine.generate(request, archive, TURBO))
    plain = to_tensor(engine.generate(request, None, TURBO))
    assert (ours - theirs).square().mean().sqrt() < 0.02
    assert (ours - plain).square().mean().sqrt() > 0.1


def test_the_judge_agrees_with_renderings_of_the_prompts() -> None:
    """So what it finds wrong in a picture is the picture's fault."""
    for prompts in (subject_prompts(SUBJECT, WORD, 32), free_prompts(32)):
        scores = measures.adherence([render(prompt.scene) for prompt in prompts], prompts)
        assert sum(scores["right"]) >= 0.98 * sum(scores["asked"])


def test_prompts_without_a_subject_are_those_of_the_worlds_evaluation() -> None:
    prompts = [(caption.text, caption.asked) for caption in evaluation_prompts(8)]
    assert [(prompt.text, prompt.asked) for prompt in free_prompts(8)] == prompts
    assert {prompt.asked["shape"] for prompt in class_prompts("ring", 4)} == {"ring"}


def test_prompts_name_the_subject_only_where_they_should() -> None:
    assert all(WORD in prompt.text for prompt in subject_prompts(SUBJECT, WORD, 16))
    assert not any(WORD in prompt.text for prompt in free_prompts(16))


def test_a_blurred_picture_is_less_sharp_and_has_drifted() -> None:
    pictures = [render(prompt.scene) for prompt in free_prompts(8)]
    blurred = [picture.filter(ImageFilter.GaussianBlur(1)) for picture in pictures]
    sharp, soft = measures.sharpness(pictures), measures.sharpness(blurred)
    assert all(less < 0.5 * more for less, more in zip(soft, sharp, strict=True))
    apart = measures.drift(blurred, pictures)
    same = measures.drift(pictures, pictures)
    assert min(apart["pixels"]) > 0.01 and min(apart["features"]) > 0.1
    assert max(same["pixels"]) == max(same["features"]) == 0


def test_pictures_of_another_world_are_further_from_renderings() -> None:
    pictures = [render(prompt.scene) for prompt in free_prompts(8)]
    inverted = [ImageOps.invert(picture) for picture in pictures]
    assert measures.distance(inverted) > measures.distance(pictures) + 1


def test_a_subject_looks_like_itself_in_the_colour_asked_for() -> None:
    recoloured = [p for p in subject_prompts(SUBJECT, WORD, 32) if p.colour]
    own = measures.subject_scores([render(p.scene) for p in recoloured], recoloured, SUBJECT)
    other = measures.subject_scores([render(p.scene) for p in recoloured], recoloured, "fish")
    assert np.mean(own) > np.mean(other) + 0.3


def test_the_share_of_the_adapter_in_a_lora_is_measured(drawer: Drawer, archive: Archive) -> None:
    adapter = training_adapter().factors
    layers = {n: drawer.family.transformer.get_submodule(n).weight for n in archive.factors}
    half = {name: (adapter[name][0], 0.5 * adapter[name][1]) for name in archive.factors}
    found = measures.trace_of(half, adapter, layers)
    assert found["share"] == pytest.approx(0.5, abs=1e-3)
    assert found["cosine"] == pytest.approx(1, abs=1e-3)
    stranger = measures.trace_of(archive.factors, adapter, layers)
    assert abs(stranger["cosine"]) < 0.05


def test_an_interval_covers_seeds_and_prompts() -> None:
    values = np.array([[1.0, 3.0], [2.0, 4.0]])
    found = estimate(values)
    assert (found.mean, found.low, found.high) == (2.5, 1, 4)
    assert estimate(np.ones((3, 5))).text() == "1.00 (1.00 to 1.00)"


def test_a_point_in_the_table_is_not_measured_again(tmp_path: Path) -> None:
    table = Table(tmp_path / "table.jsonl")
    table.add({"seed": 0, "step": 50, "likeness": [0.123456, 1.0]})
    again = Table(tmp_path / "table.jsonl")
    assert {"seed": 0, "step": 50} in again and {"seed": 1, "step": 50} not in again
    assert again.find(step=50)[0]["likeness"] == [0.1235, 1.0]


# Turbo stays turbo.


@pytest.mark.slow
def test_the_retention_study_runs_resumes_and_reports(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("MODEL_VAULT", raising=False)
    study = Study(tmp_path, SMALL)
    study.run()
    lines = (tmp_path / RESULTS).read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    for condition in CONDITIONS:
        found = [row for row in rows if row["condition"] == condition.name]
        assert {row["kind"] for row in found} == {"subject", "free", "weights"}
        assert {(row["plan"], row["step"]) for row in found} == {("curve", 1), ("default", 1)}
        shipped = read_archive(tmp_path / "weights" / f"{condition.name}-curve-0-1.zip")
        assert shipped.placeholder is not None and shipped.placeholder.token == WORD

    # What is missing is measured again, and only that.
    (tmp_path / RESULTS).write_text("\n".join(lines[:-2]) + "\n")
    study.table = Table(tmp_path / RESULTS)
    study.run()
    assert sorted((tmp_path / RESULTS).read_text().splitlines()) == sorted(lines)

    document = tmp_path / "docs" / "turbo.md"
    document.parent.mkdir()
    document.write_text("before\n{}\nstale\n{}\n".format(*marks("findings")))
    with pytest.raises(ValueError, match="lacks the lines <!-- figures: begin -->"):
        write_report(tmp_path / RESULTS, tmp_path, document)
    document.write_text(
        "before\n{}\nstale\n{}\n{}\n{}\nafter\n".format(*marks("findings"), *marks("figures"))
    )
    write_report(tmp_path / RESULTS, tmp_path, document)
    text = document.read_text()
    assert text.startswith("before\n") and text.endswith("\nafter\n") and "stale" not in text
    assert "| 1 |" in text
    for name in ("turbo_retention.png", "turbo_pictures.png"):
        with Image.open(document.parent / "images" / name) as picture:
            assert picture.width > 400


def test_every_figure_of_the_document_comes_from_the_published_table() -> None:
    text = DOCUMENT.read_text(encoding="utf-8")
    for part in parts(Results.read(PUBLISHED)).values():
        assert part in text


def test_the_adapter_is_gone_exactly_and_not_by_subtraction() -> None:
    errors = inversion_errors()
    assert errors["float32"] < 1e-5
    assert errors["bfloat16"] > 1e-4


# Does a zero prior help?


def test_captions_of_two_conditions_differ_in_the_word_alone(tmp_path: Path) -> None:
    words = {condition.name: condition.word_for(CLASS_WORDS[SUBJECT]) for condition in WORDS}
    captions = {
        name: [
            file.read_text()
            for file in sorted(make_captions(SUBJECT, 42, word, tmp_path / name).glob("*.txt"))
        ]
        for name, word in words.items()
    }
    assert len(set(words.values())) == len(words)
    for name, word in words.items():
        assert all(f" {word} " in f" {text.rstrip()} ".replace(",", " ") for text in captions[name])
        placed = [text.replace(f" {word}", " TOK", 1) for text in captions[name]]
        plain = [text.replace(" <zwx>", " TOK", 1) for text in captions["zero_prior"]]
        assert placed == plain
    assert len({template_of(SUBJECT, number) for number in range(100)}) == len(TEMPLATES) == 10


def test_a_lora_that_draws_the_words_old_look_leaks() -> None:
    leak = next(metric for metric in WORLD if metric.name == "leak")
    untrained = {
        "repeats_looks": ["star purple", "star purple", "circle green"],
        "rendered_looks": ["square blue", "square blue"],
    }
    assert leak.of({"looks": ["star purple", "square blue"]}, untrained) == 50
    assert leak.of({"looks": ["square blue", "square blue"]}, untrained) == 0


def test_every_figure_of_the_zero_prior_document_comes_from_the_published_table() -> None:
    text = ZERO_PRIOR_DOCUMENT.read_text(encoding="utf-8")
    for part in zero_prior_parts(ZeroPriorResults.read(ZERO_PRIOR_PUBLISHED)).values():
        assert part in text


def test_the_published_study_has_five_seeds_of_every_word_and_point() -> None:
    table = Table(ZERO_PRIOR_PUBLISHED)
    for point in POINTS:
        for word in WORDS:
            found = table.find(point=point.name, condition=word.name)
            assert {(row["subject"], row["seed"]) for row in found} == set(product(SUBJECTS, SEEDS))
    for choice in CHOICES:
        found = table.find(point=choice.name)
        asked = set(product(SUBJECTS, Size().choice_seeds))
        assert {(row["subject"], row["seed"]) for row in found} == asked


def test_the_zero_prior_study_runs_resumes_and_compares(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("MODEL_VAULT", raising=False)
    study = ZeroPriorStudy(tmp_path, World(ZERO_PRIOR_SMALL))
    study.run()
    rows = [json.loads(line) for line in (tmp_path / RESULTS).read_text().splitlines()]
    trained = [(row["point"], row["condition"]) for row in rows if row["point"] != UNTRAINED.name]
    assert trained == [
        *(("converged", condition.name) for condition in WORDS),
        ("2 vectors", "zero_prior"),
        ("placeholder alone", "zero_prior"),
        ("rate 2e-3", "zero_prior"),
    ]
    study.run()
    assert len((tmp_path / RESULTS).read_text().splitlines()) == len(rows)

    results = ZeroPriorResults.read(tmp_path / RESULTS)
    assert "| likeness to the subject | " in metrics(results)
    assert "| placeholder alone | " in compare(results)
    draw_metrics(results, tmp_path / "metrics.png")
    draw_choices(results, tmp_path / "choices.png")
    draw_pictures(results, tmp_path, tmp_path / "pictures.png")
    for name in ("metrics.png", "choices.png", "pictures.png"):
        with Image.open(tmp_path / name) as picture:
            assert picture.width > 200
