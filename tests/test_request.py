"""What a request asks for, what it leaves out, and what makes no sense."""

from typing import Any

import pytest

from families.bases import BASES
from inference.request import ASPECT_RATIOS, Drawing, Request, settle


def asked(**options: Any) -> Request:
    return Request(**{"prompt": "a cat", "width": 64, "height": 48, **options})


def test_seed_zero_is_a_seed_and_no_seed_is_drawn_at_random() -> None:
    base = BASES["z-image-turbo"]
    assert settle(asked(seed=0), base, 16).seeds == (0,)
    drawn = {settle(asked(seed=None), base, 16).seeds for _ in range(3)}
    assert len(drawn) == 3


@pytest.mark.parametrize("name", ["z-image-turbo", "qwen-image", "miniature-turbo"])
def test_an_aspect_ratio_keeps_the_area_of_the_bases_own_resolution(name: str) -> None:
    base = BASES[name]
    for ratio in ASPECT_RATIOS:
        drawing = settle(Request(prompt="x", aspect_ratio=ratio), base, 16)
        across, down = map(int, ratio.split(":"))
        assert drawing.width % 16 == drawing.height % 16 == 0
        tolerance = 32 / base.default_resolution  # half a multiple on either side
        assert drawing.width / drawing.height == pytest.approx(across / down, rel=tolerance)
        area = drawing.width * drawing.height
        assert area == pytest.approx(base.default_resolution**2, rel=tolerance)


def test_what_a_request_leaves_out_suits_the_base() -> None:
    request = Request(prompt="x", seed=1)
    assert settle(request, BASES["qwen-image"], 16) == Drawing(
        prompt="x",
        negative_prompt="",
        width=1328,
        height=1328,
        steps=50,
        guidance_scale=4.0,
        seeds=(1,),
    )
    turbo = settle(request, BASES["z-image-turbo"], 16)
    assert (turbo.width, turbo.steps, turbo.guidance_scale) == (1024, 8, 1.0)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"prompt": "  "}, "prompt is empty"),
        ({"height": None}, "width and height go together"),
        ({"aspect_ratio": "5:7"}, "aspect_ratio '5:7' is not one of 1:1"),
        ({"num_outputs": 0}, "num_outputs is 0"),
        ({"prompt_strength": 0.5}, "prompt_strength says how far to leave an image; give one"),
        ({"width": None, "height": None, "aspect_ratio": "custom"}, "custom wants width and"),
    ],
)
def test_a_request_that_makes_no_sense_is_refused(options: dict, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        asked(**options)


@pytest.mark.parametrize(
    ("option", "warning"),
    [
        ({"go_fast": True}, "go_fast has no effect: it saves guidance, which is off"),
        ({"negative_prompt": "blur"}, "negative_prompt has no effect: guidance_scale is 1"),
    ],
)
def test_an_option_without_effect_is_a_warning(
    option: dict, warning: str, caplog: pytest.LogCaptureFixture
) -> None:
    settle(asked(**option), BASES["z-image-turbo"], 16)
    assert warning in caplog.text
    caplog.clear()
    settle(asked(**option), BASES["z-image"], 16)
    assert caplog.text == ""
