"""The judge and the likeness can be believed: measured on renderings they never saw."""

import pytest

from miniature.drawing import render
from miniature.judge import held_out_accuracy, load_judge
from miniature.likeness import likeness
from miniature.weights import JUDGE, WEIGHTS
from miniature.world import SUBJECTS, sample_scene, subject_scene

needs_judge = pytest.mark.skipif(not (WEIGHTS / JUDGE).exists(), reason="no trained judge yet")


@needs_judge
def test_the_judge_reads_every_attribute_of_held_out_renderings() -> None:
    shares = held_out_accuracy(load_judge(), 600)
    for key, (right, asked) in shares.items():
        if key != "all":
            assert right / asked >= 0.98, f"{key}: {right} of {asked}"


@needs_judge
def test_the_judge_reads_larger_pictures_too() -> None:
    scene = sample_scene(1, "eval")
    small, large = load_judge().read([render(scene), render(scene, 128)])
    assert small == large


@pytest.mark.parametrize("subject", SUBJECTS)
def test_a_subject_is_more_like_itself_than_anything_else_is(subject: str) -> None:
    own = likeness([render(subject_scene(subject, i)) for i in range(12)], subject)
    strangers = [render(sample_scene(i, "eval")) for i in range(30)]
    strangers += [render(subject_scene(s, i)) for s in SUBJECTS if s != subject for i in range(5)]
    assert min(own) > max(likeness(strangers, subject)) + 0.05


def test_a_recoloured_subject_is_recognised_in_its_new_colour() -> None:
    pictures = [render(subject_scene("fish", i, colour="red")) for i in range(8)]
    assert min(likeness(pictures, "fish", "red")) > 0.7
