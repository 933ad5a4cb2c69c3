"""What one request does is over when the next one begins."""

import logging
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

from adapters.archive import Archive, BrokenArchive, write_archive
from adapters.factors import Factors, LoraMismatch
from adapters.placeholder import Placeholder
from families.bases import BASES, UnknownBase
from families.family import Family
from families.loading import load_family
from inference.engine import Engine
from inference.request import ASPECT_RATIOS, Drawing, Request, settle

CPU = torch.device("cpu")
TURBO, QWEN = "Tongyi-MAI/Z-Image-Turbo", "Qwen/Qwen-Image"


@pytest.fixture(scope="module")
def bases(vault: Path) -> Iterator[None]:
    """The vault for the whole file, with Turbo as the default base."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MODEL_VAULT", str(vault))
        patch.setenv("BASE_MODEL", "z-image-turbo")
        yield


@pytest.fixture(scope="module")
def shared(bases: None) -> Engine:
    """One engine for all tests: none may leave a trace in it."""
    return Engine(CPU, torch.float32)


@pytest.fixture(scope="module")
def turbo(bases: None) -> Family:
    return load_family(BASES["z-image-turbo"], CPU, torch.float32)


@pytest.fixture(scope="module")
def first(shared: Engine) -> list[bytes]:
    """What the engine draws without weights, before anything else."""
    return pixels(shared, asked())


@pytest.fixture
def engine(shared: Engine, first: list[bytes]) -> Iterator[Engine]:
    """The shared engine; a test that uses it leaves the base as it was, byte for byte."""
    yield shared
    assert pixels(shared, asked()) == first


def asked(prompt: str = "a photo of a cat", **options: Any) -> Request:
    given = {"width": 64, "height": 48, "num_inference_steps": 2, "seed": 7, **options}
    return Request(prompt=prompt, **given)


def pixels(engine: Engine, *request: Any) -> list[bytes]:
    return [image.tobytes() for image in engine.draw(*request)]


def lora(family: Family, rank: int, seed: int, targets: slice = slice(None)) -> Factors:
    generator = torch.Generator().manual_seed(seed)
    factors = {}
    for target in family.lora_targets()[targets]:
        rows, columns = family.transformer.get_submodule(target).weight.shape
        down = torch.randn(rank, columns, generator=generator) / columns**0.5
        factors[target] = (down, torch.randn(rows, rank, generator=generator) * 0.2)
    return factors


@pytest.fixture(scope="module")
def trained(turbo: Family) -> Archive:
    """Weights with a placeholder, of rank 4, over every layer."""
    row = torch.randn(1, turbo.text_width, generator=torch.Generator().manual_seed(1))
    return Archive(lora(turbo, 4, 1), Placeholder("<zwx>", row), {"base_model": TURBO})


@pytest.fixture(scope="module")
def plain(turbo: Family) -> Archive:
    """Weights without a placeholder, of another rank, over some of the layers."""
    return Archive(lora(turbo, 2, 2, slice(0, 5)), None, {"base_model": TURBO})


# Isolation.


def test_a_request_without_weights_never_sees_those_of_another(
    engine: Engine, first: list[bytes], trained: Archive, plain: Archive, tmp_path: Path
) -> None:
    subject = asked("a photo of <zwx>")
    with_trained = pixels(engine, subject, trained)
    assert pixels(engine, asked()) == first
    with_plain = pixels(engine, asked(), plain)
    assert pixels(engine, asked()) == first
    inverted = pixels(engine, asked(lora_scale=-1.0), plain)
    assert len({with_plain[0], inverted[0], first[0]}) == 3

    # From weights to weights, with nothing between.
    assert pixels(engine, subject, trained) == with_trained
    assert pixels(engine, asked(), plain) == with_plain
    assert pixels(engine, asked(lora_scale=0.0), plain) == first
    assert pixels(engine, asked(lora_scale=-1.0), plain) == inverted

    # A refused file, while weights lie over the base.
    broken = write_archive(trained, tmp_path / "broken.zip")
    broken.write_bytes(broken.read_bytes()[:-100])
    with pytest.raises(BrokenArchive):
        engine.predict(replicate_weights=broken, prompt="a photo of <zwx>")
    assert pixels(engine, asked()) == first

    # And all of it in a fresh engine.
    fresh = Engine(CPU, torch.float32)
    assert pixels(fresh, subject, trained) == with_trained
    assert pixels(fresh, asked(), plain) == with_plain
    assert pixels(fresh, asked()) == first


def test_the_placeholder_counts_for_its_request_alone(
    engine: Engine, trained: Archive, turbo: Family
) -> None:
    subject = asked("a photo of <zwx>")
    without = pixels(engine, subject)
    other = Archive(trained.factors, Placeholder("<zwx>", torch.zeros(1, 64)), trained.meta)
    found = {pixels(engine, subject, each)[0] for each in (trained, other)}
    assert len(found | {without[0]}) == 3
    assert pixels(engine, subject) == without


def test_requests_from_many_threads_are_drawn_as_one_by_one(
    engine: Engine, trained: Archive, plain: Archive
) -> None:
    requests = [
        (asked(prompt, seed=seed, lora_scale=scale), archive)
        for seed in (1, 2)
        for prompt, archive, scale in (
            ("a photo of a cat", None, 1.0),
            ("a photo of <zwx>", trained, 1.0),
            ("a photo of a cat", plain, -0.5),
        )
    ]
    alone = [pixels(engine, *request) for request in requests]
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(lambda request: pixels(engine, *request), requests * 2))
    assert together == alone * 2


# Weights that do not belong.


@pytest.mark.parametrize(
    ("meta", "base_model", "reason"),
    [
        ({"base_model": QWEN}, "z-image-turbo", "trained on qwen-image and cannot be laid over"),
        ({}, "z-image-turbo", r"8 of 8 layers do not exist in z-image-turbo: transformer_blocks"),
        ({"base_model": TURBO}, "auto", "made for another model"),
    ],
)
def test_weights_of_another_family_are_refused(
    meta: dict, base_model: str, reason: str, engine: Engine, first: list[bytes]
) -> None:
    names = [f"transformer_blocks.0.attn.{part}" for part in ("to_q", "to_k", "to_v", "to_out.0")]
    names += [name.replace(".0.", ".1.", 1) for name in names]
    factors = {name: (torch.ones(2, 64), torch.ones(64, 2)) for name in names}
    with pytest.raises(LoraMismatch, match=reason):
        engine.draw(asked(), Archive(factors, None, meta), base_model)
    assert pixels(engine, asked()) == first


def test_weights_of_another_size_are_refused(
    engine: Engine, trained: Archive, plain: Archive
) -> None:
    with_plain = pixels(engine, asked(), plain)  # what lies over the base stays as it is, too
    layer = "layers.1.attention.to_q"
    larger = {**trained.factors, layer: (torch.ones(4, 128), torch.ones(128, 4))}
    with pytest.raises(LoraMismatch, match=rf"1 of 14 .*{layer} \(LoRA 128x128, model 64x64\)"):
        engine.draw(asked(), Archive(larger, None, {"base_model": TURBO}))
    wide = Archive(trained.factors, Placeholder("<zwx>", torch.zeros(1, 128)), trained.meta)
    with pytest.raises(LoraMismatch, match="<zwx> has 128 values, .* takes 64"):
        engine.draw(asked("a photo of <zwx>"), wide)
    assert pixels(engine, asked(), plain) == with_plain


def test_weights_of_an_unknown_base_ask_for_one(engine: Engine, plain: Archive) -> None:
    foreign = Archive(plain.factors, None, {"base_model": "someone/finetune"})
    with pytest.raises(UnknownBase, match="trained on someone/finetune, which is not here"):
        engine.draw(asked(), foreign)
    assert pixels(engine, asked(), foreign, "z-image-turbo") == pixels(engine, asked(), plain)


def test_auto_is_the_base_the_weights_were_trained_on_and_back_again(
    engine: Engine, first: list[bytes], plain: Archive, caplog: pytest.LogCaptureFixture
) -> None:
    on_turbo = pixels(engine, asked(), plain)
    for_base = Archive(plain.factors, None, {"base_model": "Tongyi-MAI/Z-Image"})
    by_weights = pixels(engine, asked(guidance_scale=1), for_base)
    by_name = pixels(engine, asked(guidance_scale=1), plain, "z-image")
    assert by_weights == by_name != on_turbo
    assert "trained on z-image-turbo are drawn on z-image: expect a weaker" in caplog.text
    assert pixels(engine, asked()) == first  # the default base
    assert pixels(engine, asked(), plain) == on_turbo


def test_a_file_is_read_once_and_anew_when_its_content_changes(
    engine: Engine, trained: Archive, plain: Archive, tmp_path: Path
) -> None:
    file = write_archive(trained, tmp_path / "weights.zip")
    read = engine.read(file)
    assert engine.read(file.rename(tmp_path / "same.zip")) is read
    write_archive(plain, tmp_path / "same.zip")
    assert engine.read(tmp_path / "same.zip").factors.keys() == plain.factors.keys()


# Prompt and placeholder.


@pytest.mark.parametrize(
    ("prompt", "with_weights", "warning"),
    [
        ("a photo of a cat", True, "the prompt does not hold <zwx>, the word the weights"),
        ("a photo of <zwx>", False, "the prompt holds <zwx>, which was not trained"),
        ("<abc> beside <zwx>", True, "the prompt holds <abc>, which was not trained"),
        ("a photo of <zwx>", True, None),
        ("a photo of a cat, 3 < 4", False, None),
    ],
)
def test_a_prompt_and_weights_that_do_not_go_together_are_a_warning(
    prompt: str,
    with_weights: bool,
    warning: str | None,
    engine: Engine,
    trained: Archive,
    caplog: pytest.LogCaptureFixture,
) -> None:
    assert len(engine.draw(asked(prompt), trained if with_weights else None)) == 1
    said = [record.message for record in caplog.records if record.levelno >= logging.WARNING]
    assert (warning in "\n".join(said)) if warning else not said


# Number and size.


def test_picture_n_is_the_single_picture_of_the_seed_plus_n(
    engine: Engine, trained: Archive
) -> None:
    prompt = "a photo of <zwx>"
    together = pixels(engine, asked(prompt, num_outputs=3, seed=5), trained)
    single = [pixels(engine, asked(prompt, seed=seed), trained)[0] for seed in (5, 6, 7)]
    assert together == single
    assert len(set(together)) == 3


def test_seed_zero_is_a_seed_and_no_seed_is_drawn_at_random() -> None:
    base = BASES["z-image-turbo"]
    assert settle(asked(seed=0), base, 16).seeds == (0,)
    drawn = {settle(asked(seed=None), base, 16).seeds for _ in range(3)}
    assert len(drawn) == 3


def test_a_size_is_rounded_to_what_the_base_can_draw(
    engine: Engine, caplog: pytest.LogCaptureFixture
) -> None:
    (image,) = engine.draw(asked(width=70, height=41))
    assert image.size == (64, 48)
    assert "70x41 is drawn as 64x48: sides are multiples of 16" in caplog.text
    with pytest.raises(ValueError, match="width is 1; it lies between 32 and 2048"):
        asked(width=1, height=32)


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
    ],
)
def test_a_request_that_makes_no_sense_is_refused(options: dict, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        asked(**options)


def test_a_face_gets_picture_files(engine: Engine, first: list[bytes]) -> None:
    from PIL import Image

    told = {}
    request = {"width": 64, "height": 48, "num_inference_steps": 2, "seed": 7, "num_outputs": 2}
    paths = engine.predict(
        told.__setitem__, prompt="a photo of a cat", output_format="png", **request
    )
    assert [path.name for path in paths] == ["image-0.png", "image-1.png"]
    assert Image.open(paths[0]).tobytes() == first[0]
    assert told["seconds_per_picture"] > 0
    (photo,) = engine.predict(prompt="a cat", output_format="jpg", **request | {"num_outputs": 1})
    with Image.open(photo) as opened:
        assert (opened.format, opened.size) == ("JPEG", (64, 48))
