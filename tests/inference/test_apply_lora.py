"""`apply_lora`: a LoRA with a token changes only the images of prompts that contain it."""

import json
from typing import Any

import pytest
import torch
from loras import random_lora

from adapters.archive import Archive
from adapters.placeholder import Placeholder
from families.family import Family
from families.loading import load_family
from families.registry import BASES
from inference.engine import Engine
from inference.image_metadata import JSON, TEXT
from inference.inputs import GenerationInputs
from inference.request import Request

CPU = torch.device("cpu")
TURBO = "Tongyi-MAI/Z-Image-Turbo"
CAT = "a photo of a cat"


@pytest.fixture(scope="module")
def engine(bases: None) -> Engine:
    return Engine(CPU, torch.float32)


def archive(turbo: Family, token: str | None, seed: int, **more: Any) -> Archive:
    row = torch.randn(1, turbo.text_width, generator=torch.Generator().manual_seed(seed))
    factors = random_lora(turbo.transformer, turbo.lora_targets()[:5], 2, seed, 0.2)
    placeholders = (Placeholder(token, row),) if token else ()
    return Archive(factors, placeholders, {"base_model": TURBO}, f"{seed}" * 64, **more)


@pytest.fixture(scope="module")
def zwx(turbo: Family) -> Archive:
    return archive(turbo, "<zwx>", 1)


def asked(prompt: str, **options: Any) -> Request:
    given = {"width": 32, "height": 32, "num_inference_steps": 1, "seed": 7, **options}
    return Request(prompt=prompt, **given)


def pixels(engine: Engine, request: Request, *archives: Archive | None) -> bytes:
    first, extra = (*archives, None, None)[:2]
    return engine.generate(request, first, "z-image-turbo", extra)[0].tobytes()


@pytest.mark.parametrize("prompt", [CAT, "a <ZWX>", "a zwx", "a <zwxy>"])
def test_a_prompt_without_the_token_gives_the_base_models_image_and_a_warning(
    prompt: str, engine: Engine, zwx: Archive, caplog: pytest.LogCaptureFixture
) -> None:
    base = pixels(engine, asked(prompt))
    pixels(engine, asked("a <zwx>"), zwx)  # the LoRA is in the model before
    assert pixels(engine, asked(prompt), zwx) == base
    assert (
        "the weights are not applied, since the prompt does not contain their token <zwx>; "
        "add it to the prompt, or set apply_lora to always"
    ) in caplog.text
    assert pixels(engine, asked(prompt, apply_lora="always"), zwx) != base


def test_all_images_of_a_request_without_the_token_are_the_base_models(
    engine: Engine, zwx: Archive
) -> None:
    request = asked(CAT, num_outputs=2)
    ours, base = engine.generate(request, zwx), engine.generate(request)
    assert [each.tobytes() for each in ours] == [each.tobytes() for each in base]


@pytest.mark.parametrize("prompt", ["a <zwx>", "an x<zwx>y", "a TOK", "a <TOK>"])
def test_a_prompt_with_the_token_is_the_same_image_with_always(
    prompt: str, engine: Engine, zwx: Archive, caplog: pytest.LogCaptureFixture
) -> None:
    image = pixels(engine, asked(prompt), zwx)
    assert image == pixels(engine, asked(prompt, apply_lora="always"), zwx)
    assert "not applied" not in caplog.text and "does not contain" not in caplog.text
    assert image != pixels(engine, asked(prompt))


def test_a_token_without_brackets_is_not_part_of_a_longer_word(
    engine: Engine, turbo: Family
) -> None:
    fox = archive(turbo, "fox", 2)
    assert pixels(engine, asked("a foxglove"), fox) == pixels(engine, asked("a foxglove"))
    assert pixels(engine, asked("a fox"), fox) != pixels(engine, asked("a fox"))


def test_a_lora_without_a_token_is_always_applied(engine: Engine, turbo: Family) -> None:
    style = archive(turbo, None, 3)
    styled = pixels(engine, asked(CAT), style)
    assert styled == pixels(engine, asked(CAT, apply_lora="always"), style)
    assert styled != pixels(engine, asked(CAT))


def test_a_few_step_lora_is_always_applied(engine: Engine, turbo: Family) -> None:
    lightning = "Qwen-Image-Lightning-8steps-V1.0.safetensors"
    named = archive(turbo, "<zwx>", 3, names=(lightning,))
    assert pixels(engine, asked(CAT), named) != pixels(engine, asked(CAT))


def test_of_two_loras_each_is_applied_by_its_own_token(engine: Engine, zwx: Archive) -> None:
    turbo = load_family(BASES["z-image-turbo"], CPU, torch.float32)
    abc, style = archive(turbo, "<abc>", 2), archive(turbo, None, 3)
    assert pixels(engine, asked("a <abc>"), zwx, abc) == pixels(engine, asked("a <abc>"), abc)
    assert pixels(engine, asked("a <zwx>"), zwx, abc) == pixels(engine, asked("a <zwx>"), zwx)
    assert pixels(engine, asked(CAT), zwx, abc) == pixels(engine, asked(CAT))
    assert pixels(engine, asked(CAT), zwx, style) == pixels(engine, asked(CAT), style)
    both = pixels(engine, asked("<abc>, <zwx>"), zwx, abc)
    assert both == pixels(engine, asked("<abc>, <zwx>", apply_lora="always"), zwx, abc)


def test_the_token_may_be_in_the_negative_prompt_if_guidance_uses_it(
    engine: Engine, zwx: Archive
) -> None:
    request = asked(CAT, negative_prompt="<zwx>", guidance_scale=3)
    assert pixels(engine, request, zwx) == pixels(engine, request.replace(apply_lora="always"), zwx)
    unused = asked(CAT, negative_prompt="<zwx>", guidance_scale=1)
    assert pixels(engine, unused, zwx) == pixels(engine, asked(CAT))


def test_a_lora_that_does_not_fit_is_refused_whatever_the_prompt_is(
    engine: Engine, zwx: Archive
) -> None:
    larger = {name: (down[:, :-1], up) for name, (down, up) in zwx.factors.items()}
    wrong = Archive(larger, zwx.placeholders, {"base_model": TURBO})
    with pytest.raises(ValueError, match="have another size"):
        engine.generate(asked(CAT), wrong)


def test_scale_0_needs_no_token_and_warns_of_none(
    engine: Engine, zwx: Archive, caplog: pytest.LogCaptureFixture
) -> None:
    off = pixels(engine, asked(CAT, lora_scale=0), zwx)
    assert off == pixels(engine, asked(CAT))
    assert "apply_lora" not in caplog.text


@pytest.mark.parametrize(
    ("options", "applied"),
    [
        ({"prompt": "a <zwx>"}, True),
        ({"prompt": CAT}, False),
        ({"prompt": CAT, "apply_lora": "always"}, True),
        ({"prompt": "a <zwx>", "lora_scale": 0}, False),
    ],
)
def test_the_metadata_says_whether_the_lora_was_applied(
    options: dict[str, Any], applied: bool, engine: Engine, zwx: Archive
) -> None:
    (image,) = engine.generate(asked(**options), zwx)
    (entry,) = json.loads(image.info[JSON])["weights"]
    assert entry["applied"] == applied
    assert entry["scale"] == options.get("lora_scale", 1)
    assert ("Lora hashes" in image.info[TEXT]) == applied


def test_preview_images_have_no_such_option() -> None:
    from trainer.settings import SettingsError, TrainingInputs, resolve

    options = {"apply_lora": "with_token"}
    with pytest.raises(SettingsError, match="preview images always apply the LoRA"):
        resolve(TrainingInputs(dataset="imgs.zip", sample_options=options))
    with pytest.raises(ValueError, match="apply_lora 'never' is not one of with_token, always"):
        GenerationInputs(prompt=CAT, apply_lora="never")
