"""What one request does is over when the next one begins."""

import logging
import os
import shutil
import weakref
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from cog import Secret
from loras import random_lora
from PIL import Image

from adapters.archive import Archive, BrokenArchive, write_archive
from adapters.formats.factors import LoraMismatch
from adapters.placeholder import Placeholder
from families.family import Family
from families.loading import load_family
from families.registry import BASES, UnknownBase
from families.repository import MissingModel
from inference import acceleration
from inference.engine import Engine
from inference.generation import generate
from inference.inputs import GenerationInputs
from inference.request import Request, resolve
from inference.text_cache import TextCache

CPU = torch.device("cpu")
TURBO, QWEN = "Tongyi-MAI/Z-Image-Turbo", "Qwen/Qwen-Image"


@pytest.fixture(scope="module")
def shared(bases: None) -> Engine:
    """One engine for all tests: none may leave a trace in it."""
    return Engine(CPU, torch.float32)


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
    return [image.tobytes() for image in engine.generate(*request)]


@pytest.fixture(scope="module")
def trained(turbo: Family) -> Archive:
    """Weights with a placeholder, of rank 4, over every layer."""
    row = torch.randn(1, turbo.text_width, generator=torch.Generator().manual_seed(1))
    return Archive(
        random_lora(turbo.transformer, turbo.lora_targets(), 4, 1, 0.2),
        (Placeholder("<zwx>", row),),
        {"base_model": TURBO},
    )


@pytest.fixture(scope="module")
def plain(turbo: Family) -> Archive:
    """Weights without a placeholder, of another rank, over some of the layers."""
    return Archive(
        random_lora(turbo.transformer, turbo.lora_targets()[:5], 2, 2, 0.2),
        (),
        {"base_model": TURBO},
    )


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
        engine.predict(
            GenerationInputs(replicate_weights=broken, prompt="a photo of <zwx>"), output_dir=None
        )
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
    other = Archive(trained.factors, (Placeholder("<zwx>", torch.zeros(1, 64)),), trained.meta)
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
        ({"base_model": QWEN}, "z-image-turbo", "trained on qwen-image and cannot be applied to"),
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
        engine.generate(asked(), Archive(factors, (), meta), base_model)
    assert pixels(engine, asked()) == first


def test_weights_of_another_size_are_refused(
    engine: Engine, trained: Archive, plain: Archive
) -> None:
    with_plain = pixels(engine, asked(), plain)  # what lies over the base stays as it is, too
    layer = "layers.1.attention.to_q"
    larger = {**trained.factors, layer: (torch.ones(4, 128), torch.ones(128, 4))}
    with pytest.raises(LoraMismatch, match=rf"1 of 14 .*{layer} \(LoRA 128x128, model 64x64\)"):
        engine.generate(asked(), Archive(larger, (), {"base_model": TURBO}))
    wide = Archive(trained.factors, (Placeholder("<zwx>", torch.zeros(1, 128)),), trained.meta)
    with pytest.raises(LoraMismatch, match="<zwx> has 128 values, .* has 64"):
        engine.generate(asked("a photo of <zwx>"), wide)
    assert pixels(engine, asked(), plain) == with_plain


def test_weights_of_an_unknown_base_ask_for_one(engine: Engine, plain: Archive) -> None:
    foreign = Archive(plain.factors, (), {"base_model": "someone/finetune"})
    with pytest.raises(UnknownBase, match="trained on someone/finetune, which is not a known base"):
        engine.generate(asked(), foreign)
    assert pixels(engine, asked(), foreign, "z-image-turbo") == pixels(engine, asked(), plain)


def test_auto_is_the_base_the_weights_were_trained_on_and_back_again(
    engine: Engine, first: list[bytes], plain: Archive, caplog: pytest.LogCaptureFixture
) -> None:
    on_turbo = pixels(engine, asked(), plain)
    for_base = Archive(plain.factors, (), {"base_model": "Tongyi-MAI/Z-Image"})
    by_weights = pixels(engine, asked(guidance_scale=1), for_base)
    by_name = pixels(engine, asked(guidance_scale=1), plain, "z-image")
    assert by_weights == by_name != on_turbo
    assert "trained on z-image-turbo are used on z-image: expect a weaker" in caplog.text
    assert pixels(engine, asked()) == first  # the default base
    assert pixels(engine, asked(), plain) == on_turbo


def test_a_file_is_read_once_and_anew_when_its_content_changes(
    engine: Engine, trained: Archive, plain: Archive, tmp_path: Path
) -> None:
    file = write_archive(trained, tmp_path / "weights.zip")
    read = engine.read(file)
    assert engine.read(file.rename(tmp_path / "same.zip")).deltas is read.deltas
    write_archive(plain, tmp_path / "same.zip")
    assert engine.read(tmp_path / "same.zip").factors.keys() == plain.factors.keys()


# Prompt and placeholder.


@pytest.mark.parametrize(
    ("prompt", "with_weights", "warning"),
    [
        ("a photo of a cat", True, "the prompt does not contain their token <zwx>"),
        ("a photo of <zwx>", False, "the prompt contains <zwx>, which was not trained"),
        ("<abc> beside <zwx>", True, "the prompt contains <abc>, which was not trained"),
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
    assert len(engine.generate(asked(prompt), trained if with_weights else None)) == 1
    said = [record.message for record in caplog.records if record.levelno >= logging.WARNING]
    said = [line for line in said if "pixels that" not in line]  # the tests' images are small
    assert (warning in "\n".join(said)) if warning else not said


# Several weights at once.


@pytest.fixture(scope="module")
def second(turbo: Family) -> Archive:
    """Weights with a placeholder of their own."""
    row = torch.randn(1, turbo.text_width, generator=torch.Generator().manual_seed(9))
    return Archive(
        random_lora(turbo.transformer, turbo.lora_targets(), 3, 9, 0.2),
        (Placeholder("<abc>", row),),
        {"base_model": TURBO},
    )


def test_two_archives_are_laid_over_each_other_with_both_their_words(
    engine: Engine, trained: Archive, second: Archive, caplog: pytest.LogCaptureFixture
) -> None:
    request = asked("<abc> beside <zwx>", lora_scale=0.8, extra_lora_scale=-0.5)
    both = pixels(engine, request, trained, "auto", second)
    assert "not trained" not in caplog.text and "does not contain" not in caplog.text
    ours, theirs = trained.factors, second.factors
    stacked = {
        name: (
            torch.cat([ours[name][0], theirs[name][0]]),
            torch.cat([0.8 * ours[name][1], -0.5 * theirs[name][1]], dim=1),
        )
        for name in ours
    }
    assert trained.placeholder and second.placeholder
    words = {each.token: each.vectors for each in (trained.placeholder, second.placeholder)}
    family = load_family(BASES["z-image-turbo"], CPU, torch.float32)
    for name, (down, up) in stacked.items():
        family.transformer.get_submodule(name).weight.add_(up @ down)
    with torch.inference_mode():
        generated = generate(
            family, resolve(request, family.base, family.resolution_multiple), words
        )
    summed, applied = (
        np.frombuffer(each, np.uint8).astype(int) for each in (generated[0].tobytes(), both[0])
    )
    assert np.abs(summed - applied).max() <= 1  # the sums were rounded in another order

    alone = {pixels(engine, request, each)[0] for each in (trained, second)}
    assert len(alone | {both[0]}) == 3
    assert pixels(engine, request, trained, "auto", second) == both


def test_a_word_cannot_come_twice(
    engine: Engine, first: list[bytes], trained: Archive, second: Archive
) -> None:
    assert second.placeholder
    again = replace(second, placeholders=(Placeholder("<zwx>", second.placeholder.vectors),))
    with pytest.raises(LoraMismatch, match="in extra_lora have the same placeholder <zwx>"):
        engine.generate(asked("<zwx>"), trained, "auto", again)
    assert pixels(engine, asked()) == first


def test_weights_of_two_families_do_not_go_together(
    engine: Engine, trained: Archive, plain: Archive
) -> None:
    other = replace(plain, meta={"base_model": QWEN})
    with pytest.raises(LoraMismatch, match="in extra_lora were trained on qwen-image and cannot"):
        engine.generate(asked(), trained, "auto", other)


# Warm and quick.


def test_a_repeated_prompt_spends_no_time_in_the_text_encoder(
    bases: None, trained: Archive, second: Archive
) -> None:
    engine = Engine(CPU, torch.float32)
    engine.warm_up()
    assert engine._family is not None
    read = []
    engine._family.text_encoder.register_forward_hook(lambda *_: read.append(1))

    def times(prompt: str, *weights: Any, **options: Any) -> int:
        before = len(read)
        engine.generate(asked(prompt, **options), *weights)
        return len(read) - before

    assert times("a cat") == 1
    assert times("a cat", seed=8, width=32, height=32, num_inference_steps=1) == 0
    assert times("a cat", trained) == 0  # the LoRA is the transformer's alone
    assert times("a dog", guidance_scale=2) == 2  # and the empty prompt
    assert times("a cat", guidance_scale=2) == 0
    assert times("<zwx>", trained) == 1
    assert times("<zwx>", trained, lora_scale=0.5) == 0
    assert times("<zwx>") == 1  # as plain text
    moved = Placeholder("<zwx>", torch.ones(1, 64))
    assert times("<zwx>", replace(trained, placeholders=(moved,))) == 1
    assert times("<zwx>", trained) == 0


def test_features_leave_the_cache_when_it_is_full(turbo: Family) -> None:
    texts = TextCache(budget=10_000)
    first = texts.encode(turbo, "a cat", {})
    assert texts.encode(turbo, "a cat", {}) is first
    for number in range(8):
        texts.encode(turbo, f"a dog and {number} birds", {})
    assert texts._bytes <= 10_000
    anew = texts.encode(turbo, "a cat", {})
    assert anew is not first and torch.equal(anew, first)


def test_another_base_takes_the_place_of_the_first_in_memory(
    bases: None, plain: Archive, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    engine = Engine(CPU, torch.float32)
    engine.generate(asked(), plain)
    assert engine._family is not None
    gone = [weakref.ref(getattr(engine._family, part)) for part in ("transformer", "vae")]
    engine.generate(asked(), None, "z-image")
    assert [each() for each in gone] == [None, None]
    assert "unloading z-image-turbo; loading z-image" in caplog.text


def test_an_unknown_base_leaves_the_present_one_in_memory(engine: Engine, tmp_path: Path) -> None:
    here = engine._family
    shutil.copytree(Path(os.environ["MODEL_VAULT"]) / TURBO, tmp_path / "torn")
    shutil.rmtree(tmp_path / "torn" / "vae")
    with pytest.raises(MissingModel):
        engine.generate(asked(), None, str(tmp_path / "torn"))
    assert engine._family is here


def test_default_weights_stand_in_where_a_request_brings_none(
    bases: None, trained: Archive, plain: Archive, tmp_path: Path
) -> None:
    file = write_archive(
        replace(trained, meta={"base_model": "Tongyi-MAI/Z-Image"}), tmp_path / "w"
    )
    engine = Engine(CPU, torch.float32)
    engine.warm_up(str(file))
    assert engine._family is not None and engine._family.base.name == "z-image"
    subject, own = asked("a photo of <zwx>"), engine.read(file)
    by_default = pixels(engine, subject)
    assert by_default == pixels(engine, subject, own)
    assert pixels(engine, subject, plain, "z-image") != by_default
    assert pixels(engine, subject) == by_default


def test_compiled_blocks_draw_the_same_and_are_compiled_once_for_all_loras(
    bases: None, trained: Archive, plain: Archive, first: list[bytes]
) -> None:
    """With the compiler's front half, which is what decides whether to compile again."""
    engine = Engine(CPU, torch.float32)
    engine.warm_up()
    family = engine._family
    assert family is not None
    engine._prepared(family)
    compiled = []

    def backend(graph: torch.fx.GraphModule, _: Any) -> Any:
        compiled.append(graph)
        return graph.forward

    acceleration.compile_blocks(family.transformer, backend)
    try:
        assert pixels(engine, asked()) == first
        pixels(engine, asked(width=96))
        count = len(compiled)
        assert count > 0
        for archive, scale in ((trained, 1.0), (plain, -0.5), (trained, 0.3), (None, 1.0)):
            pixels(engine, asked(lora_scale=scale), archive)
            pixels(engine, asked(width=32, height=80, lora_scale=scale), archive)
        assert pixels(engine, asked()) == first
        assert len(compiled) == count
    finally:
        torch._dynamo.reset()


@pytest.mark.parametrize(
    ("device", "compile", "wanted"),
    [("cpu", None, False), ("cuda", None, True), ("cuda", "0", False), ("cuda", "1", True)],
)
def test_only_a_gpu_is_compiled_for_and_the_environment_may_say_no(
    device: str, compile: str | None, wanted: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("COMPILE", raising=False)
    if compile is not None:
        monkeypatch.setenv("COMPILE", compile)
    assert acceleration.wanted(torch.device(device)) == wanted


def test_go_fast_saves_a_quarter_of_the_passes(bases: None) -> None:
    family = load_family(BASES["z-image"], CPU, torch.float32)
    passes = []
    family.transformer.register_forward_hook(lambda *_: passes.append(1))

    def count(**options: Any) -> int:
        passes.clear()
        request = asked(num_inference_steps=8, **options)
        with torch.inference_mode():
            generate(family, resolve(request, family.base, family.resolution_multiple))
        return len(passes)

    assert count() == 16
    assert count(go_fast=True) == 12
    assert count(go_fast=True, guidance_scale=1) == 8


# Number and size.


def test_picture_n_is_the_single_picture_of_the_seed_plus_n(
    engine: Engine, trained: Archive
) -> None:
    prompt = "a photo of <zwx>"
    together = pixels(engine, asked(prompt, num_outputs=3, seed=5), trained)
    single = [pixels(engine, asked(prompt, seed=seed), trained)[0] for seed in (5, 6, 7)]
    assert together == single
    assert len(set(together)) == 3


def test_a_size_is_rounded_to_what_the_base_can_draw(
    engine: Engine, caplog: pytest.LogCaptureFixture
) -> None:
    (image,) = engine.generate(asked(width=70, height=41))
    assert image.size == (64, 48)
    assert "70x41 is rounded to 64x48: sides must be multiples of 16" in caplog.text
    with pytest.raises(ValueError, match="width is 1; it must be between 32 and 2048"):
        asked(width=1, height=32)


@pytest.mark.parametrize(
    ("inputs", "reason"),
    [
        ({"extra_lora_scale": 0.5}, "extra_lora_scale needs extra_lora; set both"),
        (
            {"replicate_weights": "a", "lora_weights": "b"},
            "are the same input; set only one of them",
        ),
        ({"lora_weights": "/etc/hostname"}, "'/etc/hostname' is not a file that a request may"),
        ({"replicate_weights": "/etc/hostname"}, "is not a file that a request may name"),
        ({"extra_lora": "README.md"}, "is not a file that a request may name"),
        ({"image": "/etc/hostname"}, "is not a file that a request may name"),
        ({"extra_lora": "http://weights.example/a"}, "over https only"),
    ],
)
def test_a_face_refuses_inputs_that_make_no_sense_or_reach_too_far(
    engine: Engine, inputs: dict, reason: str
) -> None:
    with pytest.raises(ValueError, match=reason):
        engine.predict(GenerationInputs(prompt="a cat", **inputs), output_dir=None)


def test_a_face_draws_with_two_loras_by_name(
    engine: Engine, trained: Archive, plain: Archive, tmp_path: Path, monkeypatch: Any
) -> None:
    """A string names a file of an allowed folder; a token that is not needed does no harm."""
    write_archive(trained, tmp_path / "one.zip")
    write_archive(plain, tmp_path / "two.zip")
    monkeypatch.setenv("ZEROPRIOR_FILES", str(tmp_path))
    small = {"width": 64, "height": 48, "num_inference_steps": 2, "seed": 7}
    (path,) = engine.predict(
        GenerationInputs(
            prompt="a photo of <zwx>",
            lora_weights="one.zip",
            extra_lora="two.zip",
            extra_lora_scale=0.5,
            output_format="png",
            **small,
        ),
        hf_api_token=Secret("hf_secret"),
        output_dir=tmp_path,
    )
    request = asked("a photo of <zwx>", extra_lora_scale=0.5)
    read = (engine.read(tmp_path / name) for name in ("one.zip", "two.zip"))
    wanted = pixels(engine, request, next(read), "auto", next(read))
    with Image.open(path) as opened:
        assert [opened.tobytes()] == wanted


def test_a_face_gets_picture_files(
    engine: Engine, first: list[bytes], tmp_path: Path, monkeypatch: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    reported = {}
    request = {"width": 64, "height": 48, "num_inference_steps": 2, "seed": 7, "num_outputs": 2}
    paths = engine.predict(
        GenerationInputs(prompt="a photo of a cat", output_format="png", **request),
        reported.__setitem__,
    )
    assert [str(path) for path in paths] == [
        "outputs/images/image-0.png",
        "outputs/images/image-1.png",
    ]
    assert Image.open(paths[0]).tobytes() == first[0]
    assert reported["seconds_per_image"] > 0
    (photo,) = engine.predict(
        GenerationInputs(prompt="a cat", output_format="jpg", **request | {"num_outputs": 1})
    )
    assert str(photo) == "outputs/images/image-2.jpg"
    with Image.open(photo) as opened:
        assert (opened.format, opened.size) == ("JPEG", (64, 48))


# What a prompt asks for.


def test_tok_in_a_prompt_is_the_trained_token(
    engine: Engine, trained: Archive, plain: Archive, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    (of_tok,), (of_token,), (of_text,) = (
        engine.generate(asked(prompt), archive)
        for prompt, archive in (("a TOK", trained), ("a <zwx>", trained), ("a TOK", plain))
    )
    assert of_tok.tobytes() == of_token.tobytes() != of_text.tobytes()
    assert of_tok.info == of_token.info
    assert "TOK in prompt is replaced by <zwx>" in caplog.text
    assert "TOK in prompt is read as plain text: the weights have no placeholder" in caplog.text
    # Of two LoRAs with a token each, the first one's is meant, on either side.
    assert trained.placeholder is not None
    other = replace(trained, placeholders=(Placeholder("<other>", trained.vectors["<zwx>"] * 2),))
    for first, second in ((trained, other), (other, trained)):
        assert first.placeholder is not None
        named = asked(f"a {first.placeholder.token}")
        both = pixels(engine, asked("a TOK"), first, "auto", second)
        assert both == pixels(engine, named, first, "auto", second)
    assert "the token of the first LoRA; write <other> for the other" in caplog.text


def test_the_end_of_a_long_prompt_is_said_to_be_lost(
    engine: Engine, trained: Archive, caplog: pytest.LogCaptureFixture
) -> None:
    long = "word " * 600
    for end in ("a dog", "a cat"):
        assert pixels(engine, asked(f"{long}{end}")) == pixels(engine, asked(long + "a dog"))
    assert "prompt is longer than the limit of 512 tokens; cut off from" in caplog.text
    engine.generate(asked(f"{long} <zwx>"), trained)
    assert "<zwx> is cut off: prompt is longer than the limit of 512 tokens" in caplog.text


def test_a_generation_can_be_watched_and_ended(engine: Engine) -> None:
    request, seen = asked(num_outputs=2), []
    images = engine.generate(request, watch=seen.append)
    assert [(each.image, each.done, each.of) for each in seen] == [
        *((0, 1, 2), (0, 2, 2), (1, 1, 2), (1, 2, 2))
    ]
    assert [each.tobytes() for each in images] == pixels(engine, request)
    assert seen[-1].preview().tobytes() == images[-1].tobytes()  # after the last step
    assert seen[-2].preview().tobytes() != images[-1].tobytes()

    def end(_: object) -> None:
        raise RuntimeError("the client has gone")

    with pytest.raises(RuntimeError, match="the client has gone"):
        engine.generate(request, watch=end)


def test_an_engine_of_one_base_refuses_others(bases: None) -> None:
    only = Engine(CPU, torch.float32, only=BASES["z-image-turbo"])
    with pytest.raises(UnknownBase, match="this server generates with z-image-turbo"):
        only.generate(asked(), base_model="z-image")
