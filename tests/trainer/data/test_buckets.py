"""Pictures of every shape find a size that the base can take, with little cut away."""

import numpy as np
import pytest
import torch
from PIL import Image

from families.loading import load_family
from trainer.data.buckets import (
    Bucket,
    buckets_for,
    crop_shifts,
    nearest_bucket,
)
from trainer.data.dataset import read_dataset
from trainer.learning.features import encode_images, fit
from trainer.settings.fields import parse_resolutions


@pytest.mark.parametrize(
    ("resolution", "multiple"), [(64, 8), (64, 16), (512, 16), (1000, 16), (1328, 16), (1024, 32)]
)
def test_buckets_keep_to_the_area_the_multiple_and_the_ratios(resolution, multiple):
    buckets = buckets_for(resolution, multiple)
    edge = resolution // multiple * multiple

    assert Bucket(edge, edge) in buckets
    for bucket in buckets:
        assert bucket.width % multiple == bucket.height % multiple == 0
        assert 0.85 * edge**2 <= bucket.width * bucket.height <= resolution**2
        assert 1 / 2.2 <= bucket.width / bucket.height <= 2.2
        assert Bucket(bucket.height, bucket.width) in buckets


def test_even_the_miniature_has_landscape_square_and_portrait():
    assert buckets_for(64, 16) == (Bucket(48, 80), Bucket(64, 64), Bucket(80, 48))
    assert len(buckets_for(64, 8)) == 5


def test_a_resolution_below_the_bases_smallest_is_refused():
    with pytest.raises(ValueError, match="resolution 16 is too small .* use 32 or more"):
        buckets_for(16, 32)


@pytest.mark.parametrize(
    ("size", "bucket"),
    [
        ((4000, 3000), Bucket(1184, 880)),
        ((3000, 4000), Bucket(880, 1184)),
        ((6000, 4000), Bucket(1248, 832)),
        ((1080, 1920), Bucket(768, 1360)),
        ((500, 500), Bucket(1024, 1024)),
        ((8000, 1000), Bucket(1456, 720)),
    ],
)
def test_common_photo_shapes_find_a_bucket_of_their_own(size, bucket):
    assert nearest_bucket(*size, resolution=1024, multiple=16) == bucket


def test_fit_cuts_the_sides_evenly_and_keeps_the_scale():
    # A white band in the middle half of a 2:1 picture is exactly what a square bucket shows.
    pixels = np.zeros((100, 200, 3), np.uint8)
    pixels[:, 50:150] = 255
    picture_CHW = fit(Image.fromarray(pixels), Bucket(64, 64))

    assert picture_CHW.shape == (3, 64, 64)
    assert picture_CHW.dtype == torch.float32
    assert picture_CHW.is_contiguous()
    assert picture_CHW.min() > 0.9  # the filter reaches a little over the cut

    whole_CHW = fit(Image.fromarray(pixels), Bucket(80, 48))
    assert whole_CHW.shape == (3, 48, 80)
    assert whole_CHW.min() == -1.0
    assert torch.equal(whole_CHW, whole_CHW.flip(2))


def test_fine_stripes_become_grey_not_moire():
    stripes = np.zeros((512, 512, 3), np.uint8)
    stripes[:, ::2] = 255
    inside_CHW = fit(Image.fromarray(stripes), Bucket(64, 64))[:, 4:-4, 4:-4]
    assert inside_CHW.abs().max() < 0.05


def test_resolutions_are_read_from_text():
    assert parse_resolutions("512", 1024) == (512,)
    assert parse_resolutions(" 1024, 512,768,512 ", 64) == (512, 768, 1024)
    assert parse_resolutions([512, "768"], 64) == (512, 768)
    assert parse_resolutions(None, 64) == parse_resolutions("", 64) == (64,)
    assert parse_resolutions("512,", 64) == (512,)


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("512x512", "is invalid"),
        ("-512", "is invalid"),
        ("9" * 5000, "is invalid"),
        ("8", "resolution 8 is out of range; use 16 to 4096"),
        ("512,5000", "resolution 5000 is out of range"),
    ],
)
def test_other_resolutions_are_refused(text, complaint):
    with pytest.raises(ValueError, match=complaint):
        parse_resolutions(text, 1024)


def test_no_hidden_color_gets_into_the_edge_of_a_cut_out() -> None:
    pixels = np.zeros((63, 63, 4), np.uint8)
    pixels[:, :31] = 255  # white; the rest is black and transparent
    red, green, blue, alpha = fit(Image.fromarray(pixels), Bucket(16, 16))
    visible = alpha > -0.9
    assert 16 * 7 <= visible.sum() < 16 * 16
    for color in (red, green, blue):
        assert color[visible].min() > 0.99 and color[:, -1].max() == -1


def test_crops_are_shifted_to_both_ends_of_what_is_cut_off(small, tmp_path):
    stripes = np.zeros((64, 96, 3), np.uint8)
    stripes[:, 48:] = 255
    for name, pixels in (("square", stripes[:, 16:80]), ("wide", stripes[20:44])):
        Image.fromarray(pixels).save(tmp_path / f"{name}.png")
    settings = small(dataset=tmp_path, crop_jitter=0.5, horizontal_flip=True)
    bucket = Bucket(64, 64)
    whole = Image.fromarray(stripes)
    shares = {}
    for shift in crop_shifts(96, 64, bucket, settings.crop_jitter):
        shares[shift] = float((fit(whole, bucket, shift) > 0).float().mean())
    assert shares == pytest.approx({0.0: 0.5, -0.5: 0.375, 0.5: 0.625}, abs=0.02)
    assert crop_shifts(64, 64, bucket, 1.0) == crop_shifts(66, 64, bucket, 1.0) == (0.0,)
    assert crop_shifts(96, 64, bucket, 0.0) == (0.0,)

    samples = encode_images(load_family(settings.base), read_dataset(tmp_path, "TOK"), settings)
    found = [(each.name, each.shift, each.mirrored, each.repeats) for each in samples]
    shifts = [0.0, -0.5, 0.5]
    assert found == [("square.png", 0.0, mirrored, 3) for mirrored in (False, True)] + [
        ("wide.png", shift, mirrored, 1) for mirrored in (False, True) for shift in shifts
    ]
    means = torch.stack([each.mean_CHW for each in samples[2:]])
    assert len(means.unique(dim=0)) == 6
