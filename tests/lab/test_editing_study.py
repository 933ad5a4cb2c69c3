"""The datasets of the study of editing."""

from pathlib import Path

import numpy as np
from PIL import Image

from lab.experiments.editing.study import IMAGES, after, before, pairs
from miniature.qwen.models import PIXELS
from miniature.world import attributes
from trainer.data.dataset import read_dataset


def test_targets_are_the_control_images_with_the_subject_in_place_of_the_object(
    tmp_path: Path,
) -> None:
    pairs(tmp_path)
    examples = read_dataset(tmp_path, "", "<zwx>", controls=(1, 1))
    assert len(examples) == IMAGES
    for each in examples:
        [control] = each.controls
        assert (each.caption, each.width, each.height) == ("turn it into <zwx>", PIXELS, PIXELS)
        images = [Image.open(tmp_path / name) for name in (each.name, control.name)]
        differs = (np.asarray(images[0]) != np.asarray(images[1])).any(axis=2)
        assert 0.01 < differs.mean() < 0.5
    scene = before(5)
    assert attributes(after(scene))["place"] == attributes(scene)["place"]
