"""What the text encoder does not read, TOK in prompts, and options behind them."""

import logging
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from dataset_files import make_zip, picture

from families.family import Family
from families.loading import load_family
from families.registry import BASES
from families.text_limit import cut
from inference.prompts import (
    check_length,
    foreign_syntax,
    place_subject,
    prompts_of,
    read_options,
)
from inference.request import Request
from trainer.data.dataset import DatasetError, read_dataset
from trainer.learning.caption_length import check_texts
from trainer.monitor.previews import preview_requests
from trainer.settings.fields import Settings, SettingsError, resolve
from trainer.settings.inputs import TrainingInputs

LONG = " ".join(f"word{number}" for number in range(600))
ROWS = {"<zwx>": torch.zeros(1, 1)}


@pytest.fixture(scope="module", params=["z-image", "qwen-image"])
def family(request: pytest.FixtureRequest, vault: Path) -> Family:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MODEL_VAULT", str(vault))
        patch.setenv("HF_HUB_OFFLINE", "1")
        made = load_family(BASES[request.param])
        _ = made.prompts
    return made


@pytest.fixture
def said(caplog: pytest.LogCaptureFixture) -> pytest.LogCaptureFixture:
    caplog.set_level(logging.INFO)
    return caplog


# ---- The limit -----------------------------------------------------------------------------------


@pytest.mark.parametrize("letters", ["a cat, ", "一张照片，", "größe ", "🐈 "])
def test_a_text_is_cut_where_the_encoder_stops_reading(family: Family, letters: str) -> None:
    """Kept and lost together are the text, and what is kept fits."""
    tokens, text = 0, ""
    while tokens <= family.text_limit(family.tokenize("")):
        text += letters * 20
        tokens = family.tokenize(text).prompt_end
    found = cut(family, text)
    assert found is not None and found.lost
    if "\ufffd" not in found.kept + found.lost:  # the bytes of a character are on both sides
        assert found.kept + found.lost == text
        assert cut(family, found.kept) is None


def test_what_fits_is_whole(family: Family) -> None:
    assert cut(family, "") is None
    assert cut(family, "a photo of <zwx>", ROWS) is None
    text = "cat " * 400
    assert cut(family, text) is None


def test_a_token_behind_the_cut_is_lost_and_one_before_it_kept(family: Family) -> None:
    found = cut(family, f"{LONG} <zwx>", ROWS)
    assert found is not None and not found.keeps("<zwx>") and found.lost.endswith(" <zwx>")
    assert found.first_lost().startswith("word")  # whole words
    found = cut(family, f"<zwx> {LONG}", ROWS)
    assert found is not None and found.keeps("<zwx>") and found.kept.startswith("<zwx> word0")


# ---- Captions ------------------------------------------------------------------------------------


@pytest.fixture
def settings_of(small: Callable[..., Settings], family: Family) -> Callable[..., Settings]:
    """Settings of a short training on the family's base."""
    return lambda **changes: small(base_model=family.base.name, **changes)


def checked(tmp_path: Path, settings: Settings, files: dict[str, bytes], family: Family) -> None:
    images = {f"0{number}.png": picture(8, 8) for number in (1, 2, 3)}
    path = make_zip(tmp_path / "a.zip", images | files)
    examples = read_dataset(path, settings.default_caption, settings.subject)
    prompts = [prompts_of(each) for each in preview_requests(settings, family)]
    check_texts(examples, prompts, family, settings)
    assert not {"transformer", "text_encoder", "vae"} & set(vars(family))  # no weights for this


def test_captions_that_are_cut_are_named_with_the_words_that_are_lost(
    tmp_path: Path,
    family: Family,
    settings_of: Callable[..., Settings],
    said: pytest.LogCaptureFixture,
) -> None:
    files = {"01.txt": f"TOK {LONG}".encode(), "02.txt": f"{LONG} TOK".encode()}
    checked(tmp_path, settings_of(), files, family)
    assert "2 captions are longer than the limit of 512 tokens" in said.text
    assert "01.txt: 'word" in said.text and "02.txt: 'word" in said.text
    assert "no effect in these captions: 02.txt; move it" in said.text
    assert "default_caption" not in said.text


def test_a_subject_that_every_caption_loses_is_refused(
    tmp_path: Path, family: Family, settings_of: Callable[..., Settings]
) -> None:
    files = {f"0{number}.txt": f"{LONG} TOK".encode() for number in (1, 2, 3)}
    with pytest.raises(
        DatasetError,
        match=r"no caption mentions <zwx> within the text encoder's limit of 512 tokens",
    ):
        checked(tmp_path, settings_of(), files, family)
    # Neither does a caption without it help, nor the default.
    settings = settings_of(default_caption=f"{LONG} TOK")
    with pytest.raises(DatasetError, match="limit of 512 tokens: 01.txt, default_caption; move it"):
        checked(tmp_path, settings, {**files, "02.txt": b"a cat", "03.txt": b""}, family)
    # A trigger word is text, and is lost as well.
    settings = settings_of(train_placeholder_token=False, trigger_word="r3dfox")
    files = {name: text.replace(b"TOK", b"a r3dfox") for name, text in files.items()}
    with pytest.raises(DatasetError, match="no caption mentions r3dfox"):
        checked(tmp_path, settings, files, family)


def test_sample_prompts_that_are_cut_are_named(
    tmp_path: Path,
    family: Family,
    settings_of: Callable[..., Settings],
    said: pytest.LogCaptureFixture,
) -> None:
    prompts = ("a photo of TOK", f"{LONG} TOK --l 3 --n {LONG}")
    checked(tmp_path, settings_of(sample_prompts=prompts), {}, family)
    (first, second) = [each.message for each in said.records if "sample prompt 2" in each.message]
    assert first.startswith(
        "<zwx> is cut off: sample prompt 2, prompt is longer than the limit of 512 tokens"
    )
    assert second.startswith("sample prompt 2, negative_prompt is longer")
    assert "sample prompt 1" not in said.text


def test_a_prompt_that_is_cut_is_said_with_what_is_lost(
    family: Family, said: pytest.LogCaptureFixture
) -> None:
    check_length(family, {"prompt": "a <zwx>", "negative_prompt": LONG}, ROWS)
    check_length(family, {"prompt": f"{LONG} <zwx>"}, ROWS)
    negative, prompt = [record.message for record in said.records]
    assert negative.startswith("negative_prompt is longer than the limit of 512 tokens; cut off")
    assert prompt.startswith("<zwx> is cut off: prompt is longer")


# ---- TOK -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "becomes"),
    [
        ("a photo of TOK", "a photo of <zwx>"),
        ("TOK's hat, (TOK)", "<zwx>'s hat, (<zwx>)"),
        ("TOKYO, STOK, tok", "TOKYO, STOK, tok"),
        ("<zwx> and TOK", "<zwx> and <zwx>"),
    ],
)
def test_tok_in_a_prompt_is_the_subjects_token(text: str, becomes: str) -> None:
    placed = place_subject(Request(prompt=text, negative_prompt=text), [["<zwx>"]])
    assert (placed.prompt, placed.negative_prompt) == (becomes, becomes)


def test_tok_without_a_token_and_with_two_is_said(said: pytest.LogCaptureFixture) -> None:
    asked = Request(prompt="a photo of TOK")
    assert place_subject(asked, []) == asked
    assert "TOK in prompt is read as plain text: the weights have no placeholder" in said.text
    said.clear()
    assert place_subject(asked, [["<one>"], ["<two>"]]).prompt == "a photo of <one>"
    assert "TOK is replaced by <one>, the token of the first LoRA; write <two>" in said.text
    said.clear()
    assert place_subject(Request(prompt="TOKYO"), []).prompt == "TOKYO"
    assert place_subject(Request(prompt="a <TOK>"), [["<TOK>"]]).prompt == "a <TOK>"
    assert not said.records


# ---- Options behind prompts ----------------------------------------------------------------------


def test_options_behind_a_sample_prompt_are_its_own(
    small: Callable[..., Settings], said: pytest.LogCaptureFixture
) -> None:
    options = "--w 64 --h 96 --s 4 --d 42 --l 3.5 --n blurry TOK, ugly --ss euler_a --g 2"
    settings = small(
        sample_prompts=[f"a photo of TOK {options}", "TOK, plain"],
        sample_options={"num_inference_steps": 2, "negative_prompt": "no TOK"},
    )
    assert settings.sample_prompts == ("a photo of <zwx>", "<zwx>, plain")
    first, second = preview_requests(settings, load_family(settings.base))
    assert (first.width, first.height, first.steps, first.seeds) == (64, 96, 4, (42,))
    assert (first.guidance_scale, first.negative_prompt) == (3.5, "blurry <zwx>, ugly")
    assert (second.steps, second.seeds, second.negative_prompt) == (2, (5,), "no <zwx>")
    assert "sample prompt 1: not supported, ignored: --ss euler_a, --g 2" in said.text


def test_options_mean_what_they_mean_elsewhere() -> None:
    assert read_options("a cat --ar 16:9") == ("a cat", {"aspect_ratio": "16:9"}, [])
    assert read_options("a cat --l 0") == ("a cat", {"guidance_scale": 1.0}, [])
    assert read_options("a cat --g=4") == ("a cat", {"guidance_scale": 4.0}, [])
    text, fields, unread = read_options(
        "a cat --W 64 --h 96 --seed 3 --cfg 4 --sampler euler a --s 5"
    )
    assert (text, unread) == ("a cat", ["--sampler euler a"])
    assert fields == {
        "width": 64,
        "height": 96,
        "seed": 3,
        "guidance_scale": 4.0,
        "num_inference_steps": 5,
    }
    assert read_options("a cat --n ugly, wet --foo 2") == (
        "a cat",
        {"negative_prompt": "ugly, wet"},
        ["--foo 2"],
    )
    for plain in ("a cat -- and a dog", "a cat --wearing a hat", "a well--known cat", "--"):
        assert read_options(plain) == (plain, {}, [])


@pytest.mark.parametrize(
    ("prompt", "complaint"),
    [
        ("TOK --w wide --h 64", "--w is 'wide'; it must be a whole number"),
        ("TOK --w 64", "width and height go together"),
        ("TOK --s 1000", "num_inference_steps is 1000"),
        ("--w 64 --h 64", "prompt is empty"),
    ],
)
def test_a_wrong_option_is_refused_with_its_prompt(prompt: str, complaint: str) -> None:
    with pytest.raises(SettingsError, match="sample prompt 2") as caught:
        resolve(
            TrainingInputs(
                dataset="a.zip", base_model="miniature", sample_prompts=["a cat", prompt]
            )
        )
    assert complaint in str(caught.value)


def test_tok_and_trigger_in_a_sample_prompt_are_the_trigger_word() -> None:
    settings = resolve(
        TrainingInputs(
            dataset="a.zip",
            base_model="miniature",
            train_placeholder_token=False,
            trigger_word="r3dfox",
            sample_prompts="TOK and [trigger]",
        )
    )
    assert settings.sample_prompts == ("r3dfox and r3dfox",)


def test_syntax_of_other_programs_is_found_and_english_is_not() -> None:
    for text in (
        "a cat (red:1.2)",
        "<lora:style:0.8>",
        "[trigger] here",
        "a {red|blue} cat",
        "a __colour__ cat",
        "a cat BREAK a dog",
        "a cat --v 6",
        "a cat\nNegative prompt: a dog",
    ):
        assert foreign_syntax(text), text
    for text in ("a cat (at 12:30 pm)", "<zwx> [sic] {x}", "BREAKING", "a -- b", "a: (b, c)"):
        assert not foreign_syntax(text), text
