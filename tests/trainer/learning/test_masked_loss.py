"""What a mask leaves out has hardly an effect, and a run without masks is as it always was."""

import json
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from dataset_files import encoded, make_folder
from loops import make_loop
from PIL import Image, ImageOps

from adapters.archive import read_archive
from families.loading import load_family
from trainer import run
from trainer.data.buckets import Bucket
from trainer.data.dataset import DatasetError, read_dataset
from trainer.learning.checkpoint import Checkpoint, write_checkpoint
from trainer.learning.features import encode_images, fit_mask
from trainer.learning.loop import Loop
from trainer.learning.loss import flow_loss, loss_weights, noisy, weighted
from trainer.learning.resume import read_resume
from trainer.learning.saving import state_of
from trainer.monitor.validation import Validation
from trainer.settings.fields import Settings

Make = Callable[..., Settings]


def masked(photos: Path, folder: Path, mask: Callable[[Image.Image], Image.Image]) -> Path:
    """The photographs in a folder, each with a mask."""
    files: dict[str, bytes] = {}
    with zipfile.ZipFile(photos) as archive:
        for name in archive.namelist():
            files[name] = archive.read(name)
            if not name.endswith(".txt"):
                with archive.open(name) as file, Image.open(file) as image:
                    files[f"masks/{Path(name).stem}.png"] = encoded(mask(image))
    return make_folder(folder, files)


def left_half(image: Image.Image) -> Image.Image:
    mask = Image.new("L", image.size)
    mask.paste(255, (0, 0, image.width // 2, image.height))
    return mask


def test_the_gradient_is_a_tenth_outside_the_mask_and_equal_in_sum() -> None:
    mask_1HW = torch.zeros(1, 8, 8)
    mask_1HW[:, :4, :4] = 1
    weights_B1HW = torch.stack([loss_weights(mask_1HW), loss_weights(torch.ones(1, 8, 8))])
    predicted = torch.zeros(2, 3, 8, 8, requires_grad=True)
    weighted((predicted - 1).square(), weights_B1HW).mean().backward()
    assert predicted.grad is not None
    gradient_CHW = predicted.grad[0] / predicted.grad[1]  # relative to an image without a mask
    outside = gradient_CHW[:, mask_1HW[0] == 0]
    torch.testing.assert_close(outside, torch.full_like(outside, 0.1))
    torch.testing.assert_close(gradient_CHW[:, :4, :4], torch.full((3, 4, 4), 0.1 + 0.9 * 4))
    torch.testing.assert_close(gradient_CHW.mean(), torch.tensor(1.0))


def test_a_mask_is_cropped_and_mirrored_as_its_image_is(tmp_path: Path, small: Make) -> None:
    """The mask is the image itself, black and white; so where it is white, the image is."""
    image = Image.new("RGB", (300, 100))
    image.paste("white", (90, 20, 170, 90))  # partly beyond the crop to 2:1
    mask = image.convert("L").resize((600, 200), Image.Resampling.NEAREST)
    path = make_folder(tmp_path / "set", {"a.png": encoded(image), "a.mask.png": encoded(mask)})
    settings = small(dataset=path, resolution="64,128", horizontal_flip=True)
    (example,) = read_dataset(path, "TOK", masks="auto")
    family = load_family(settings.base)
    plain, larger, mirrored, larger_mirrored = encode_images(family, [example], settings)
    assert [each.mirrored for each in (plain, larger, mirrored, larger_mirrored)] == [
        *(False, False),
        *(True, True),
    ]

    # A latent is white if its pixels in the image's own crop are.
    for sample in (plain, larger):
        assert sample.weights_1HW is not None
        rows, columns = sample.mean_CHW.shape[1:]
        scale = image.height / rows
        box = (image.width - columns * scale) / 2, 0, (image.width + columns * scale) / 2, 100
        light = image.convert("L").resize((columns, rows), Image.Resampling.BOX, box=box)
        expected = torch.from_numpy(np.array(light))[None] / 255
        torch.testing.assert_close(sample.weights_1HW, loss_weights(expected), atol=0.2, rtol=0)
        assert sample.weights_1HW[0, 0, 0] < 0.5 < 1 < sample.weights_1HW.max()
    for one, other in ((plain, mirrored), (larger, larger_mirrored)):
        assert one.weights_1HW is not None and other.weights_1HW is not None
        assert torch.equal(one.weights_1HW.flip(-1), other.weights_1HW)
        assert one.caption == other.caption and one.name == other.name
        assert not torch.equal(one.weights_1HW, other.weights_1HW)

    # The mirror image itself is encoded: mirrored latents are others.
    turned = make_folder(tmp_path / "turned", {"a.png": encoded(ImageOps.mirror(image))})
    again = read_dataset(turned, "TOK")
    ours = encode_images(load_family(settings.base), again, small(resolution="64"))[0]
    torch.testing.assert_close(mirrored.mean_CHW, ours.mean_CHW, rtol=1e-3, atol=1e-3)
    assert not torch.allclose(mirrored.mean_CHW, plain.mean_CHW.flip(-1), atol=1e-2)


def test_a_subject_that_the_crop_cuts_off_is_an_error(tmp_path: Path) -> None:
    mask = Image.new("L", (300, 100))
    mask.paste(255, (0, 0, 30, 100))
    files = {"a.png": encoded(Image.new("RGB", (300, 100))), "a_mask.png": encoded(mask)}
    (example,) = read_dataset(make_folder(tmp_path / "set", files), "TOK", masks="auto")
    with pytest.raises(DatasetError, match="a_mask.png: is black in the part of a.png"):
        fit_mask(example, Bucket(64, 64), (8, 8))


def test_masks_that_are_off_or_white_change_nothing(
    photos: Path, tmp_path: Path, small: Make
) -> None:
    """A run reads the same examples, and has no weights; a white mask has weights of 1."""
    examples = read_dataset(masked(photos, tmp_path / "set", left_half), "TOK", masks="off")
    assert examples == read_dataset(photos, "TOK")
    loop = make_loop(small(), 1)
    assert loop.samples[0].weights_1HW is None
    latents, noise, sigma, captions = loop.batch(0)
    ones = loss_weights(torch.ones(1, 1, *latents.shape[2:]))
    results = []
    for weights in (None, ones):
        text = loop.captions.features(captions)
        loss = flow_loss(loop.family, latents, noise, sigma, text, weights)
        results.append([loss, *torch.autograd.grad(loss, loop.lora_parameters)])
    assert all(torch.equal(one, other) for one, other in zip(*results, strict=True))


def test_a_run_with_masks_and_mirror_images_is_measured_recorded_and_resumed(
    photos: Path, tmp_path: Path, small: Make, caplog: pytest.LogCaptureFixture
) -> None:
    settings = small(
        dataset=masked(photos, tmp_path / "set", left_half),
        **{"batch_size": 2, "steps": 3, "horizontal_flip": True, "checkpoint_every": 2},
    )
    archive = read_archive(run.train(settings))
    assert archive.meta["dataset"]["masks"] == 6
    assert archive.meta["settings"]["horizontal_flip"] is True
    assert "horizontal_flip also trains on mirror images" in caplog.text

    loop = make_loop(settings)
    assert len(loop.samples) == 12
    measured, expected = held_out_losses(loop)
    assert measured == pytest.approx(expected, rel=1e-4)
    for step in range(2):
        loop.step(step)
    path = write_checkpoint(state_of(loop), tmp_path)
    loop.step(2)
    whole = {name: value.detach().clone() for name, value in loop.named.items()}
    losses = loop.history.plain()["losses"]
    assert losses == json.loads((tmp_path / "out" / "record.json").read_text())["losses"]
    kept = read_resume(settings.replace(resume_from=path), [])
    assert isinstance(kept, Checkpoint)
    loop.restore(kept)
    loop.step(2)
    assert all(torch.equal(value, whole[name]) for name, value in loop.named.items())
    assert loop.history.plain()["losses"] == losses

    # Another mask is another dataset.
    make_folder(tmp_path / "set", {"masks/coffee.png": encoded(Image.new("L", (384, 256), 200))})
    again = settings.replace(resume_from=tmp_path / "out" / "checkpoints")
    read_resume(again, read_dataset(*(settings.dataset, *settings.caption_rules)))
    assert "0 images added, 0 removed, 0 captions changed, 1 masks changed" in caplog.text


def held_out_losses(loop: Loop) -> tuple[list[float], list[float]]:
    """The losses of the first image as the trainer measures them, and by their definition."""
    validation, total = Validation(loop, loop.samples[:1]), [0.0] * 4
    for level, each, turn in validation._items:
        noise = validation._noise(each, turn)
        sigma = torch.tensor([validation.curves.sigmas[level]])
        text = loop.captions.features([each.caption])
        noised = noisy(each.mean_CHW[None], noise[None], sigma)
        with torch.no_grad():
            velocity_BCHW = loop.family.velocity(noised, sigma, text)
        error = (velocity_BCHW[0] - (noise - each.mean_CHW)).square()
        assert each.weights_1HW is not None and not each.mirrored
        total[level] += float((error * each.weights_1HW).mean()) / 4
    return validation.measure(), total
