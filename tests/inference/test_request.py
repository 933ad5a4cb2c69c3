"""What a request asks for, what it leaves out, and what makes no sense."""

from typing import Any

import pytest

from families.few_steps import find_few_step_lora
from families.registry import BASES
from inference.inputs import ASPECT_RATIOS, LENGTHS, GenerationInputs
from inference.request import Request, ResolvedRequest, check_work, resolve


def asked(**options: Any) -> Request:
    return Request(**{"prompt": "a cat", "width": 64, "height": 48, **options})


def test_seed_zero_is_a_seed_and_no_seed_is_drawn_at_random() -> None:
    base = BASES["z-image-turbo"]
    assert resolve(asked(seed=0), base, 16).seeds == (0,)
    generated = {resolve(asked(seed=None), base, 16).seeds for _ in range(3)}
    assert len(generated) == 3


@pytest.mark.parametrize("name", ["width", "num_outputs", "num_inference_steps", "seed"])
def test_a_fraction_is_refused_where_something_is_counted(name: str) -> None:
    sides = {"width": 64, "height": 64}
    for value in (64.5, 64.0):
        with pytest.raises(ValueError, match=f"{name} is {value}; it must be a whole number"):
            Request(prompt="a", **(sides | {name: value}))


@pytest.mark.parametrize("name", ["z-image-turbo", "qwen-image", "miniature-turbo"])
def test_an_aspect_ratio_keeps_the_area_of_the_bases_own_resolution(name: str) -> None:
    base = BASES[name]
    for ratio in ASPECT_RATIOS:
        resolved = resolve(Request(prompt="x", aspect_ratio=ratio), base, 16)
        across, down = map(int, ratio.split(":"))
        assert resolved.width % 16 == resolved.height % 16 == 0
        tolerance = 32 / base.default_resolution  # half a multiple on either side
        assert resolved.width / resolved.height == pytest.approx(across / down, rel=tolerance)
        area = resolved.width * resolved.height
        assert area == pytest.approx(base.default_resolution**2, rel=tolerance)


def test_what_a_request_leaves_out_suits_the_base() -> None:
    request = Request(prompt="x", seed=1)
    assert resolve(request, BASES["qwen-image"], 16) == ResolvedRequest(
        prompt="x",
        negative_prompt="",
        width=1328,
        height=1328,
        steps=50,
        guidance_scale=4.0,
        seeds=(1,),
    )
    turbo = resolve(request, BASES["z-image-turbo"], 16)
    assert (turbo.width, turbo.steps, turbo.guidance_scale) == (1024, 8, 1.0)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"prompt": "  "}, "prompt is empty"),
        ({"height": None}, "width and height go together"),
        ({"aspect_ratio": "5:7"}, "aspect_ratio '5:7' is not one of 1:1"),
        ({"num_outputs": 0}, "num_outputs is 0; it must be between 1 and 8"),
        ({"seed": 2**63}, f"seed is {2**63}; it must be between 0 and {2**63 - 1}"),
        ({"seed": 10**5000}, "seed is a number of more than 1000 bits; it must be between"),
        ({"num_inference_steps": "8"}, "num_inference_steps is '8'; it must be a whole number"),
        ({"num_inference_steps": 8.5}, "num_inference_steps is 8.5; it must be a whole number"),
        ({"width": 64.0}, "width is 64.0; it must be a whole number"),
        ({"seed": 1.5}, "seed is 1.5; it must be a whole number"),
        ({"prompt": 5}, "prompt is 5; it must be text"),
        ({"negative_prompt": ["ugly"]}, "ugly'.; it must be text"),
        ({"prompt": "x" * 10_001}, "prompt has 10,001 characters; at most 10,000 are accepted"),
        ({"negative_prompt": "x" * 10_001}, "negative_prompt has 10,001 characters; at most"),
        ({"prompt_strength": 0.5}, "prompt_strength needs an image"),
        ({"width": None, "height": None, "aspect_ratio": "custom"}, "custom needs width and"),
    ],
)
def test_a_request_that_makes_no_sense_is_refused(options: dict, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        asked(**options)


@pytest.mark.parametrize(
    ("option", "warning"),
    [
        ({"go_fast": True}, "go_fast has no effect: guidance is off"),
        ({"negative_prompt": "blur"}, "negative_prompt has no effect: guidance_scale is 1"),
    ],
)
def test_an_option_without_effect_is_a_warning(
    option: dict, warning: str, caplog: pytest.LogCaptureFixture
) -> None:
    size = {"width": 1024, "height": 1024}
    resolve(asked(**option, **size), BASES["z-image-turbo"], 16)
    assert warning in caplog.text
    caplog.clear()
    resolve(asked(**option, **size), BASES["z-image"], 16)
    assert caplog.text == ""


@pytest.mark.parametrize("name", BASES)
def test_an_image_beyond_the_largest_of_its_base_is_refused_with_that_size(name: str) -> None:
    base = BASES[name]
    most = base.largest_resolution
    for width, height in ((most, most), (most // 2, most)):
        assert resolve(asked(width=width, height=height), base, 16).width == width
    for width, height in ((most, most + 1), (2048, most + 8)):
        if max(width, height) <= 2048:
            said = f"{width}x{height} is too large for {name}: at most {most}x{most}"
            with pytest.raises(ValueError, match=said):
                resolve(asked(width=width, height=height), base, 16)


@pytest.mark.parametrize("name", BASES)
def test_every_shape_of_every_base_is_accepted_eight_times(name: str) -> None:
    base = BASES[name]
    for ratio in ASPECT_RATIOS:
        request = Request(prompt="x", aspect_ratio=ratio, num_outputs=8)
        resolve(request, base, 16)
        check_work(request, base)


@pytest.mark.parametrize(
    ("name", "options", "said"),
    [
        (
            "qwen-image",
            {"width": 2048, "height": 2048, "num_outputs": 8, "num_inference_steps": 60},
            "8 images of 2048x2048 in 60 steps with guidance, .* 960 steps; .* is 840",
        ),
        ("z-image", {"num_inference_steps": 200, "num_outputs": 8}, "3,200 steps; .* is 2,000"),
        (
            "miniature-turbo",
            {"width": 256, "height": 256, "num_outputs": 8, "num_inference_steps": 200},
            "8 images of 256x256 in 200 steps are too much for one request: 1,600 steps; .* is 125",
        ),
    ],
)
def test_the_work_of_all_images_together_is_bounded(name: str, options: dict, said: str) -> None:
    request = Request(prompt="x", **options)
    with pytest.raises(ValueError, match=said):
        check_work(request, BASES[name])


def test_an_engine_refuses_what_is_too_much_before_it_loads_a_model(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from inference.engine import Engine

    engine = Engine()
    monkeypatch.setattr(engine, "_load", lambda base: pytest.fail("a model is loaded"))
    given: dict[str, Any] = {"prompt": "x", "base_model": "miniature-turbo"}
    with pytest.raises(ValueError, match="1000x1000 is too large for miniature-turbo"):
        engine.predict(GenerationInputs(**given, width=1000, height=1000), output_dir=None)
    with pytest.raises(ValueError, match="too much for one request"):
        engine.predict(
            GenerationInputs(**given, width=256, height=256, num_outputs=8, num_inference_steps=20),
            output_dir=None,
        )
    for name in ("lora_weights", "extra_lora"):
        with pytest.raises(ValueError, match=f"{name} has .* characters; at most"):
            GenerationInputs(**given | {name: "x" * (LENGTHS[name] + 1)})
    with pytest.raises(ValueError, match="hf_api_token has 1,001 characters; at most"):
        engine.predict(GenerationInputs(**given), hf_api_token="x" * 1_001)


@pytest.mark.parametrize("scale", [0.0, 0.5, 0.99, -1, 0])
def test_a_guidance_below_1_is_answered_with_what_off_is(scale: float) -> None:
    with pytest.raises(ValueError, match=f"guidance_scale is {scale:g}; 1 is off, so use 1"):
        asked(guidance_scale=scale)


@pytest.mark.parametrize(
    ("option", "base", "warning"),
    [
        ({"guidance_scale": 5}, "z-image-turbo", "its defaults are guidance_scale 1 and 8 steps"),
        (
            {"guidance_scale": 5, "num_inference_steps": 20},
            "miniature-turbo",
            "miniature-turbo is distilled to run without guidance",
        ),
        ({"num_inference_steps": 40}, "z-image-turbo", "z-image-turbo is distilled to 8 steps"),
        ({"num_inference_steps": 8}, "qwen-image", "qwen-image is made for 50 steps"),
        ({"width": 2048, "height": 2048}, "z-image", "2048x2048 is far from the 1024x1024 pixels"),
        ({"width": 256, "height": 256}, "qwen-image", "256x256 is far from the 1328x1328 pixels"),
        ({"guidance_scale": 7}, "qwen-image", None),
        ({"guidance_scale": 1}, "z-image-turbo", None),
        ({"width": 1344, "height": 768}, "z-image-turbo", None),
    ],
)
def test_values_that_are_wrong_for_the_base_are_a_warning(
    option: dict, base: str, warning: str | None, caplog: pytest.LogCaptureFixture
) -> None:
    resolve(Request(**{"prompt": "a cat", **option}), BASES[base], 16)
    assert (warning in caplog.text) if warning else caplog.text == ""


# Few-step LoRAs.

LIGHTNING = "Qwen-Image-Lightning-8steps-V1.1.safetensors"


@pytest.mark.parametrize(
    ("name", "found"),
    [
        (LIGHTNING, ("qwen_image", 8, 1.0, 3.0)),
        ("Qwen-Image-2512-Lightning-4steps-V1.0-bf16.safetensors", ("qwen_image", 4, 1.0, 3.0)),
        ("qwen_image_lightning_8step.safetensors", ("qwen_image", 8, 1.0, 3.0)),
        (
            "Wuli-Qwen-Image-2512-Turbo-LoRA-4steps-V2.0-bf16.safetensors",
            ("qwen_image", 4, 1.0, 3.0),
        ),
        ("Z-Image-Fun-Lora-Distill-8-Steps-2603-ComfyUI.safetensors", ("z_image", 8, 1.0, None)),
        ("Qwen-Image-2.1-Lightning-4steps.safetensors", None),
        ("qwen-lightning-storm-style.safetensors", None),
        ("fox.safetensors", None),
    ],
)
def test_a_few_step_lora_is_known_by_its_name(name: str, found: tuple | None) -> None:
    lora = find_few_step_lora(["weights.zip", name])
    values = lora and (lora.family, lora.steps, lora.guidance_scale, lora.shift)
    assert values == found


def test_a_few_step_lora_brings_its_settings_and_the_request_s_own_count_first(
    caplog: pytest.LogCaptureFixture,
) -> None:
    lora, base = find_few_step_lora([LIGHTNING]), BASES["qwen-image"]
    with caplog.at_level("INFO"):
        resolved = resolve(Request(prompt="x"), base, 16, lora)
    assert (resolved.steps, resolved.guidance_scale, resolved.shift) == (8, 1.0, 3.0)
    assert "Qwen-Image-Lightning: 8 steps, guidance 1, shift 3" in caplog.text
    assert not [each for each in caplog.records if each.levelname == "WARNING"]
    own = Request(prompt="x", num_inference_steps=6, guidance_scale=2, shift=2.5)
    resolved = resolve(own, base, 16, lora)
    assert (resolved.steps, resolved.guidance_scale, resolved.shift) == (6, 2, 2.5)
    assert "is made for 8 steps, guidance 1, shift 3; used: 6 steps" in caplog.text
    assert resolve(Request(prompt="x", shift=0), base, 16, lora).shift is None
    largest = Request(prompt="x", width=2048, height=2048, num_outputs=8)
    check_work(largest, base, lora)  # 8 steps without guidance, not 50 with it
    with pytest.raises(ValueError, match="too much for one request"):
        check_work(largest.replace(num_inference_steps=200), base, lora)
    assert resolve(Request(prompt="x", shift=3), base, 16).shift == 3
