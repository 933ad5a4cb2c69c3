"""What is uploaded can be used: by diffusers alone, as its own card says, and by us."""

import ast
import logging
import re
import shlex
import zipfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from itertools import cycle
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
import transformers
import yaml
from diffusers.pipelines.qwenimage import pipeline_qwenimage_edit_plus as edit_plus
from hub_server import Hub
from PIL import Image
from stock_processor import StockProcessor
from transformers import Qwen2Tokenizer, Qwen2VLImageProcessorPil
from vault.models import write_qwen_image_21, write_qwen_image_edit

from adapters.archive import Archive, read_archive, write_archive
from adapters.placeholder import Placeholder
from families.base import Base
from families.loading import load_family
from families.models.qwen_image import QwenImage
from families.registry import family_of, find_base
from trainer.result.model_card import model_card
from trainer.result.publishing import check_repository, publish
from trainer.run import train
from trainer.run_files import UPLOAD
from trainer.settings.fields import SettingsError, resolve
from trainer.settings.inputs import TrainingInputs
from trainer.settings.secret import Secret, Secrets

Finished = Callable[..., Path]

PROMPT, WORD = "a photo of <zwx> on a beach, <zwx>", "<zwx>"


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A Hub on this machine in the place of the real one."""
    with Hub() as hub:
        hub.use(monkeypatch, tmp_path / "cache")
        monkeypatch.setattr("diffusers.loaders.lora_base.HF_HUB_OFFLINE", False)
        yield hub


@pytest.fixture
def finished(use_vault: Path, tmp_path: Path) -> Finished:
    """A weights.zip as a training leaves it, with a LoRA that shows, a sample and a report."""

    def make(
        base_model: str = "z-image-turbo",
        word: str | None = WORD,
        others: Sequence[str] = (),
        controls: Sequence[str] = (),
        **options: Any,
    ) -> Path:
        base = find_base(base_model)
        family = load_family(base, torch.device("cpu"), torch.float32)
        generator = torch.Generator().manual_seed(0)
        layers = dict(family.transformer.named_modules())
        factors = {}
        for name in family.lora_targets():
            rows, columns = layers[name].weight.shape
            down, up = (
                torch.randn(4, columns, generator=generator),
                torch.randn(rows, 4, generator=generator),
            )
            # Rounded as the archive rounds them, so that both sides read the same numbers.
            factors[name] = ((down * 0.1).bfloat16().float(), (up * 0.05).bfloat16().float())
        placeholders: tuple[Placeholder, ...] = ()
        if word is not None:
            vectors = torch.randn(2, family.text_width, generator=generator) * 0.05
            placeholders = (
                Placeholder(word, vectors),
                *(Placeholder(each, vectors * 2) for each in others),
            )
        meta = {
            "base_model": base.hub_id,
            "training_mode": "zero_prior" if word else "baseline",
            "train_placeholder_token": word is not None,
            "placeholder_token": word,
            "rank": 4,
            "steps": 3,
            "settings": {
                "sample_prompts": [" and ".join((PROMPT, *others))],
                "sample_options": {"width": 64, "height": 64, "num_inference_steps": 2} | options,
                "seed": 5,
            },
        }
        if controls:
            meta["dataset"] = {"pictures": [{"controls": controls}], "controls": len(controls)}
        if word is None:
            del meta["placeholder_token"]
        if others:
            meta["placeholder_tokens"] = [word, *others]
        output = tmp_path / "out"
        picture = output / "samples" / "step-000003" / "00.png"
        picture.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (64, 64), "red").save(picture)
        (output / "report.html").write_text("<p>report</p>")
        return write_archive(Archive(factors, placeholders, meta), output / "weights.zip")

    return make


def code_of(card: str) -> str:
    [code] = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    return code


def generated_by_us(weights: Path, *changes: dict[str, Any]) -> list[Image.Image]:
    """The sample's picture, once for each of the changes to its request."""
    from inference.engine import Engine
    from inference.request import Request

    engine = Engine(torch.device("cpu"), torch.float32)
    archive = engine.read(weights)
    request = {"prompt": PROMPT, "width": 64, "height": 64, "num_inference_steps": 2, "seed": 5}
    return [engine.generate(Request(**(request | change)), archive)[0] for change in changes]


def difference(one: Image.Image, other: Image.Image) -> int:
    """Of the levels of two pictures, the largest."""
    pixels = [
        torch.frombuffer(bytearray(each.convert("RGB").tobytes()), dtype=torch.uint8).int()
        for each in (one, other)
    ]
    return int((pixels[0] - pixels[1]).abs().max())


# ---- The card ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("base_model", "word", "options"),
    [
        ("z-image-turbo", WORD, {}),
        ("z-image-de-turbo", None, {"guidance_scale": 2.5}),
        ("qwen-image", WORD, {"guidance_scale": 4.0}),
    ],
)
def test_the_cards_code_draws_our_picture_with_diffusers_alone(
    base_model: str,
    word: str | None,
    options: dict[str, Any],
    *,
    finished: Finished,
    hub: Hub,
    vault: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The bases are folders of the working folder here, by their Hub names; the rest is as it is
    for a reader."""
    weights = finished(base_model, word, **options)
    assert publish(weights, "me/fox", Secret(hub.token)) == f"{hub.url}/me/fox"
    card = hub.files["me/fox"]["README.md"].decode()
    work = tmp_path / "work"
    work.mkdir()
    for organisation in vault.iterdir():
        (work / organisation.name).symlink_to(organisation)
    monkeypatch.chdir(work)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    code = code_of(card)
    assert not re.search(r"\b(adapters|families|inference|trainer)\b", code)
    exec(compile(code, "the card", "exec"), {})

    with Image.open("image.png") as theirs:
        ours, plain = generated_by_us(weights, options, options | {"lora_scale": 0.0})
        assert difference(theirs, ours) <= 1
        assert difference(theirs, plain) > 30  # so it is the LoRA's picture


def test_the_card_of_several_subjects_inserts_every_token(
    finished: Finished, hub: Hub, vault: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    weights = finished(others=["<kul>"])
    publish(weights, "me/fox", Secret(hub.token))
    card = hub.files["me/fox"]["README.md"].decode()
    assert "placeholder-2.safetensors" in hub.files["me/fox"]
    assert 'instance_prompt: "<zwx>, <kul>"' in card
    for organisation in vault.iterdir():
        (tmp_path / organisation.name).symlink_to(organisation)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    exec(compile(code_of(card), "the card", "exec"), {})
    with Image.open("image.png") as theirs:
        (ours,) = generated_by_us(weights, {"prompt": f"{PROMPT} and <kul>"})
        assert difference(theirs, ours) <= 1


@pytest.mark.parametrize(
    ("base_model", "others", "options"),
    [
        ("qwen-image-edit-2511", ["<kul>"], {"guidance_scale": 4.0}),
        ("qwen-image-2.1", [], {}),
    ],
)
def test_the_card_of_pairs_edits_as_we_do(
    base_model: str,
    others: list[str],
    options: dict[str, Any],
    *,
    finished: Finished,
    hub: Hub,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Of two control images, with all tokens. Only the pipeline's processor is made here, without
    its part for videos, which needs torchvision."""
    edge = 80  # pixels, of references
    base = find_base(base_model)
    write = write_qwen_image_edit if base.needs_references else write_qwen_image_21
    folder = write(tmp_path / "models") / base.hub_id
    monkeypatch.setenv("MODEL_VAULT", str(tmp_path / "models"))
    monkeypatch.setattr(Base, "reference_resolution", edge)
    seen = replace(QwenImage.reference_format, seen_pixels=100**2)
    monkeypatch.setattr(QwenImage, "reference_format", seen)
    monkeypatch.setattr(edit_plus, "CONDITION_IMAGE_SIZE", 100**2)
    monkeypatch.setattr(edit_plus, "VAE_IMAGE_SIZE", edge**2)
    weights = finished(base_model, others=others, controls=["control/1.png", "control_2/1.png"])
    publish(weights, "me/fox", Secret(hub.token))
    card = hub.files["me/fox"]["README.md"].decode()
    assert "--reference-images image.jpg image-2.jpg\n" in card

    classes = family_of(base).classes
    pipeline: Any = getattr(diffusers, classes.editing_pipeline or classes.pipeline)
    processor = StockProcessor(
        Qwen2Tokenizer.from_pretrained(folder / "processor"),
        Qwen2VLImageProcessorPil.from_pretrained(folder / "processor"),
    )

    def loaded(name: str, dtype: torch.dtype) -> Any:
        assert name == base.hub_id
        parts: dict[str, Any] = {
            "text_encoder": getattr(transformers, classes.text_encoder),
            "transformer": getattr(diffusers, classes.transformer),
            "vae": getattr(diffusers, classes.vae),
            "scheduler": diffusers.FlowMatchEulerDiscreteScheduler,
        }
        if base.needs_references:
            parts["tokenizer"] = Qwen2Tokenizer
        made = {part: each.from_pretrained(folder / part) for part, each in parts.items()}
        return pipeline(**made, processor=processor)

    monkeypatch.setattr(pipeline, "from_pretrained", loaded)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.chdir(tmp_path)
    for number, name in enumerate(("image.jpg", "image-2.jpg")):
        Image.effect_noise((60 + 20 * number, 60), 90).convert("RGB").save(name)
    exec(compile(code_of(card), "the card", "exec"), {})
    references = [Image.open(name) for name in ("image.jpg", "image-2.jpg")]
    request = {"prompt": " and ".join((PROMPT, *others)), "reference_images": references, **options}
    with Image.open("edited.png") as theirs:
        ours, plain = generated_by_us(weights, request, request | {"prompt": "a photo"})
        assert difference(theirs, ours) <= 1
        assert difference(theirs, plain) > 1


def test_the_card_has_what_the_hub_reads(finished: Finished, hub: Hub) -> None:
    publish(finished(), "me/fox", Secret(hub.token))
    files = hub.files["me/fox"]
    _, front, text = files["README.md"].decode().split("---\n", 2)
    assert yaml.safe_load(front) == {
        "base_model": "Tongyi-MAI/Z-Image-Turbo",
        "base_model_relation": "adapter",
        "library_name": "diffusers",
        "pipeline_tag": "text-to-image",
        "tags": ["text-to-image", "lora", "diffusers", "template:sd-lora"],
        "instance_prompt": "<zwx>",
        "widget": [{"text": PROMPT, "output": {"url": "samples/00.png"}}],
    }
    assert set(files) == {
        *("README.md", "pytorch_lora_weights.safetensors", "placeholder.safetensors"),
        *("weights.zip", "samples/00.png", "report.html"),
    }
    assert "| adapter | LoRA of rank 4 |" in text and "| seed | 5 |" in text
    assert hub.private == {"me/fox": True}


def test_the_uploaded_files_are_read_by_us(finished: Finished, hub: Hub, tmp_path: Path) -> None:
    from adapters.archive import read_archive, read_loose

    weights = finished()
    publish(weights, "me/fox", Secret(hub.token))
    for name, content in hub.files["me/fox"].items():
        if "/" not in name:
            (tmp_path / name).write_bytes(content)
    whole = read_archive(tmp_path / "weights.zip")
    loose = read_loose(tmp_path / "pytorch_lora_weights.safetensors", WORD)
    assert whole.placeholder is not None and loose.placeholder is not None
    assert torch.equal(whole.placeholder.vectors, loose.placeholder.vectors)
    assert whole.factors.keys() == loose.factors.keys()


@pytest.mark.parametrize(
    ("kind", "readers"), [("lokr", "ComfyUI and ai-toolkit read"), ("loha", "ComfyUI reads")]
)
def test_the_card_of_a_lokr_and_a_loha_names_the_programs_that_read_it(
    kind: str, readers: str
) -> None:
    meta = {
        **{"base_model": "Tongyi-MAI/Z-Image-Turbo", "placeholder_token": WORD, "steps": 3},
        **{"adapter": kind, "rank": 4, "settings": {}},
    }
    card = model_card("me/fox", meta, [])
    assert f"{readers} `pytorch_lora_weights.safetensors`" in card
    assert "load_lora_weights" not in card and "library_name" not in card
    assert "folder `comfyui`" in card and "python -m inference" in card
    assert "load_lora_weights" in model_card("me/fox", meta | {"adapter": "dora"}, [])


def test_a_base_that_was_a_folder_has_a_card_without_its_path() -> None:
    meta = {"base_model": "my-finetune", "base_family": "z_image", "settings": {"seed": 1}}
    card = model_card("me/fox", meta, [])
    assert "base_model:" not in card.split("---\n", 2)[1]  # it is not on the Hub
    assert "from_pretrained('my-finetune'" in code_of(card)
    compile(code_of(card), "the card", "exec")


CANARY = "Zqxv"  # in every text below, and in nothing else
HOSTILE = [
    *("'{0}' \"{0}\" \\\\{0}", "{0}`{0}", "``{0}``", "```{0}", "{0}````````{0}", "`{0}`", "\\`{0}"),
    *("{0}|{0}", "|---|{0}|", "[{0}](https://x.example)", "![{0}](x)", "<b>{0}</b>", "<!--{0}"),
    *("<script>{0}</script>", "--- {0}", "{0} ---", "{0}: {{a: *b}} #", "%{0}", "&{0};", "~~~{0}"),
    *("{{}}{0}{{text}}", "%s{0}", "${{{0}}}$(ls)", "{0}\u202e", "#{0}", "{0}\\"),
]
LINE_ENDS = ["\n", "\r", "\r\n", "\u2028", "\u2029", "\x85", "\x0b", "\x0c", "\x1c", "\0", "\n\n"]
PROMPTS = [text.format(CANARY) for text in HOSTILE] + [
    f"{CANARY}{end}{line}{end}# {CANARY}{end}[{CANARY}](https://x.example)"
    for end in LINE_ENDS
    for line in ("```", "---", "</x>", "````", "~~~", "    x")
]
TOKENS = ["<zwx>"] + [
    token for text in HOSTILE if (token := text.format(CANARY).replace(" ", "")).isprintable()
]


def card_of(prompt: str, word: str | None, base_model: str) -> str:
    meta: dict[str, Any] = {
        "base_model": base_model,
        "settings": {
            "sample_prompts": [prompt],
            "sample_options": {"negative_prompt": prompt, "guidance_scale": 4.0},
            "seed": 1,
        },
        "rank": 1,
        "steps": 1,
    }
    if word is not None:
        meta["placeholder_token"] = word
    return model_card("me/fox", meta, [(prompt, "samples/00.png")])


def outline(markdown: str) -> list[str]:
    """What a Markdown text is made of, without its code; asserts that the canary is only there."""
    parser = pytest.importorskip("markdown_it").MarkdownIt("commonmark").enable("table")
    found = []
    for block in parser.parse(markdown):
        for token in [block, *(block.children or [])]:
            found.append(token.type)
            if token.type not in ("fence", "code_inline", "inline"):
                assert CANARY not in f"{token.content} {token.attrs}", (token.type, token.content)
    return found


def test_no_prompt_and_no_token_breaks_out_of_the_card() -> None:
    pairs: list[tuple[str, str | None]] = list(zip(PROMPTS, cycle([*TOKENS, None]), strict=False))
    pairs += [("a photo", word) for word in TOKENS]
    bases = cycle(["Qwen/Qwen-Image", "Tongyi-MAI/Z-Image-Turbo"])
    for (prompt, word), base_model in zip(pairs, bases, strict=False):
        card = card_of(prompt, word, base_model)
        assert re.match(r"---\n", card)
        _, front, body = card.split("---\n", 2)  # as careless readers do it
        parsed = yaml.safe_load(front)
        assert parsed["widget"][0]["text"] == " ".join(prompt.split())
        assert parsed.get("instance_prompt") == word
        # The Python compiles, and says what was asked for.
        code = code_of(card)
        tree = ast.parse(code)
        texts = {node.value for node in ast.walk(tree) if isinstance(node, ast.Constant)}
        assert prompt in texts and (word is None or word in texts)
        [shell] = re.findall(r"```sh\n(.*?)```", card, re.DOTALL)
        if "\0" not in prompt:
            assert shlex.split(shell)[-1] == prompt
        # And everything else is as it is for harmless texts.
        plain = card_of("a photo", "<zwx>" if word else None, base_model).split("---\n", 2)[2]
        if word is not None and "|" in word:  # has no row in the table
            plain = re.sub(r"\n\| placeholder token \|.*", "", plain)
        assert outline(body) == outline(plain), (prompt, word)


# ---- Before a training ---------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["fox", "me/fox/more", "me/fo x", "/fox", "me/fox--", "me/-fox"])
def test_a_name_that_the_hub_would_refuse_is_refused_first(name: str, hub: Hub) -> None:
    with pytest.raises(SettingsError, match="hf_repo_id"):
        check_repository(name, Secret(hub.token))
    assert hub.asked == []


def test_without_a_token_it_says_where_one_comes_from(hub: Hub) -> None:
    with pytest.raises(SettingsError, match="needs hf_token, HF_TOKEN .* https://huggingface.co/"):
        check_repository("me/fox")


@pytest.mark.parametrize("token", ["Bearer hf_x", "hf_a\nb", "hf_ü", "hf_\x00"])
def test_a_token_that_no_header_can_hold_is_refused_unasked_and_unshown(
    token: str, hub: Hub
) -> None:
    with pytest.raises(SettingsError, match="characters that no token has") as refusal:
        check_repository("me/fox", Secret(token))
    assert token not in str(refusal.value) and hub.asked == []


@pytest.mark.parametrize("token", ["hf_wrong", "api_org_wrong", "abc"])
def test_a_token_the_hub_does_not_know_is_refused(token: str, hub: Hub) -> None:
    with pytest.raises(SettingsError, match="rejected by the Hub"):
        check_repository("me/fox", Secret(token))
    assert hub.asked == ["/api/whoami-v2"]


def test_the_hub_decides_what_a_token_looks_like(hub: Hub) -> None:
    hub.token = "oauth-0123456789"
    check_repository("me/fox", Secret(hub.token))


OPERATOR = "hf_operator" + "y" * 20


@pytest.fixture
def operators_login(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Hub:
    """The Hub, on a machine whose operator is logged in everywhere, and may write everywhere."""
    from huggingface_hub import constants

    hub.token = OPERATOR
    login, netrc = tmp_path / "login", tmp_path / "netrc"
    login.write_text(OPERATOR)
    netrc.write_text(f"machine 127.0.0.1 login me password {OPERATOR}\n")
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(login))
    monkeypatch.setenv("HF_TOKEN", OPERATOR)
    monkeypatch.setenv("HUGGING_FACE_HUB_TOKEN", OPERATOR)
    monkeypatch.setenv("NETRC", str(netrc))
    monkeypatch.setattr("huggingface_hub.hf_api.api.token", OPERATOR)
    return hub


@pytest.mark.parametrize("repository", ["me/fox", "other/fox"])
@pytest.mark.parametrize("token", [None, " \n"])
def test_a_request_without_a_token_is_refused_before_its_dataset_is_read(
    repository: str, token: str | None, operators_login: Hub, tmp_path: Path
) -> None:
    from trainer.run import train_from_inputs

    with pytest.raises(SettingsError, match="hf_repo_id needs hf_token in the same req") as refusal:
        train_from_inputs(
            TrainingInputs(
                dataset=tmp_path / "is-not-there.zip",
                output_dir=tmp_path / "out",
                hf_repo_id=repository,
            ),
            served=True,
            hf_token=token,
        )
    said = str(refusal.value)
    assert operators_login.asked == [] and not (tmp_path / "out").exists()
    assert not any(name in said for name in ("me", "studio", "HF_TOKEN") if name in said.split())


def test_a_request_uploads_with_its_own_token_alone(
    operators_login: Hub, finished: Finished, tmp_path: Path
) -> None:
    hub = operators_login
    hub.token = "hf_customer" + "z" * 20
    check_repository("me/fox", Secret(hub.token), from_request=True)
    assert publish(finished(), "me/fox", Secret(hub.token), from_request=True) is not None
    assert {each for each in hub.authorizations if each} == {f"Bearer {hub.token}"}


def test_on_the_command_line_the_login_counts(operators_login: Hub, finished: Finished) -> None:
    check_repository("me/fox")
    assert publish(finished(), "me/fox") is not None


def test_no_cookie_of_one_request_is_sent_with_the_next(hub: Hub, finished: Finished) -> None:
    hub.set_cookie = "session=anna; Path=/"
    check_repository("me/fox", Secret(hub.token), from_request=True)
    assert publish(finished(), "me/fox", Secret(hub.token), from_request=True) is not None
    hub.cookies.clear()
    check_repository("me/fox", Secret(hub.token), from_request=True)
    assert hub.cookies == [None]


@pytest.mark.parametrize("name", ["me/fox", "Me/fox", "studio/fox"])
def test_a_token_that_may_write_there_is_taken(name: str, hub: Hub) -> None:
    check_repository(name, Secret(hub.token))
    assert hub.asked == ["/api/whoami-v2"] and hub.files == {}


def test_a_repository_of_somebody_else_is_refused(hub: Hub) -> None:
    message = "belongs to me, studio, but the owner in hf_repo_id is other"
    with pytest.raises(SettingsError, match=message):
        check_repository("other/fox", Secret(hub.token))


def test_a_token_that_may_only_read_is_refused(hub: Hub) -> None:
    hub.user["auth"]["accessToken"]["role"] = "read"
    with pytest.raises(SettingsError, match="is read-only"):
        check_repository("me/fox", Secret(hub.token))


def test_a_fine_grained_token_must_cover_the_repository(hub: Hub) -> None:
    def scope(name: str, *permissions: str) -> None:
        scoped = [{"entity": {"type": "user", "name": name}, "permissions": list(permissions)}]
        hub.user["auth"]["accessToken"] = {
            "displayName": "fine",
            "role": "fineGrained",
            "fineGrained": {"scoped": scoped, "global": []},
        }

    scope("me", "repo.content.read", "repo.write")
    check_repository("me/fox", Secret(hub.token))
    for name, permission in (("studio", "repo.write"), ("me", "repo.content.read")):
        scope(name, permission)
        with pytest.raises(SettingsError, match="has no write access to repositories of me"):
            check_repository("me/fox", Secret(hub.token))


def test_a_hub_out_of_reach_does_not_stop_a_training(
    hub: Hub, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    check_repository("me/fox", Secret(hub.token))
    assert "cannot be reached" in caplog.text and hub.token not in caplog.text


# ---- At its end ----------------------------------------------------------------------------------


@pytest.mark.parametrize("step", ["/api/repos/create", "/preupload/", "/large/", "/commit/"])
def test_an_upload_that_fails_leaves_the_weights_and_says_how_to_repeat_it(
    step: str, finished: Finished, hub: Hub, caplog: pytest.LogCaptureFixture
) -> None:
    weights = finished()
    hub.refuse[step] = 403
    with caplog.at_level(logging.WARNING, "trainer"):
        assert publish(weights, "me/fox", Secret(hub.token)) is None
    [warning] = [
        each.getMessage() for each in caplog.records if each.name == "trainer.result.publishing"
    ]
    assert f"The weights are saved in {weights}" in warning and weights.is_file()
    folder = weights.parent / "hub-upload"
    assert warning.endswith(f"hf upload me/fox {folder}")
    assert {"README.md", "weights.zip"} <= {path.name for path in folder.iterdir()}
    assert hub.token not in caplog.text


def test_an_upload_is_repeated_in_the_place_of_the_one_that_failed(
    finished: Finished, hub: Hub
) -> None:
    weights = finished()
    written = weights.read_bytes()
    hub.refuse["/commit/"] = 403
    for _ in range(2):
        assert publish(weights, "me/fox", Secret(hub.token)) is None
    hub.refuse.clear()
    assert publish(weights, "me/fox", Secret(hub.token)) is not None
    assert hub.files["me/fox"]["weights.zip"] == weights.read_bytes() == written
    assert not (weights.parent / "hub-upload").exists()


def test_an_upload_that_went_well_leaves_no_second_copy(finished: Finished, hub: Hub) -> None:
    weights = finished()
    publish(weights, "me/fox", Secret(hub.token))
    names = {path.name for path in weights.parent.iterdir()}
    assert names == {"weights.zip", "samples", "report.html"}
    assert hub.files["me/fox"]["weights.zip"] == weights.read_bytes()


# ---- The whole way ------------------------------------------------------------------------------


def test_a_watched_and_published_training_shows_its_keys_nowhere(
    photos: Path,
    use_vault: Path,
    hub: Hub,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    capfd: pytest.CaptureFixture[str],
) -> None:
    pytest.importorskip("wandb")
    from cog import Secret as CogSecret
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    from trainer.run import train_from_inputs

    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    key = "0123456789abcdef0123456789abcdef01234567"
    with caplog.at_level(logging.DEBUG, "trainer"):
        weights = train_from_inputs(
            TrainingInputs(
                dataset=photos,
                base_model="z-image",
                resolution=64,
                rank=2,
                steps=2,
                seed=5,
                output_dir=tmp_path / "out",
                sample_prompts="a photo of <zwx>",
                preserve="off",
                sample_options={"width": 64, "height": 64, "num_inference_steps": 2},
                trackers="tensorboard,wandb",
                wandb_project="foxes",
                hf_repo_id="me/fox",
            ),
            wandb_api_key=CogSecret(key),
            hf_token=CogSecret(hub.token + "\n"),
        )

    # The trackers saw what there was to see.
    events = EventAccumulator(str(weights.parent / "trackers" / "tensorboard")).Reload()
    scalars = set(events.Tags()["scalars"])
    assert {"loss", "learning_rate/lora", "learning_rate/placeholder"} <= scalars
    assert {"gradient_norm/lora", "gradient_norm/placeholder", "placeholder_norm"} <= scalars
    # Of few images none is held out.
    assert "fit/loss" in scalars and any("fit/sigma_" in name for name in scalars)
    assert [event.step for event in events.Scalars("loss")] == [1, 2]
    assert events.Images("samples/00")[-1].step == 2
    # The Hub holds the result, and its card was made of this very training.
    files = hub.files["me/fox"]
    assert files["weights.zip"] == weights.read_bytes()
    assert files["report.html"] == (weights.parent / "report.html").read_bytes()
    card = files["README.md"].decode()
    assert "| steps | 2 |" in card and "encode('a photo of <zwx>')" in card
    assert files["samples/00.png"].startswith(b"\x89PNG")
    # Neither key is anywhere.
    written = [path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()]
    said = "".join(capfd.readouterr()) + caplog.text
    for secret in (key, hub.token):
        assert secret not in said
        assert not [each for each in (*written, *files.values()) if secret.encode() in each]
        with zipfile.ZipFile(weights) as zipped:  # members are stored as they are, but be sure
            assert not [n for n in zipped.namelist() if secret.encode() in zipped.read(n)]


@pytest.mark.parametrize("allowed", [False, True])
def test_a_result_whose_checks_failed_is_uploaded_only_if_that_is_allowed(
    allowed: bool,
    photos: Path,
    use_vault: Path,
    hub: Hub,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    settings = resolve(
        TrainingInputs(
            dataset=photos,
            base_model="z-image",
            resolution=64,
            rank=2,
            steps=2,
            batch_size=1,
            learning_rate=1,
            validation_every=0,
            preserve="off",
            output_dir=tmp_path / "out",
            hf_repo_id="me/fox",
            allow_failed_checks=allowed,
        )
    )
    weights = train(settings, secrets=Secrets(hf_token=Secret(hub.token)))
    assert weights.is_file() and read_archive(weights).meta["result"] == "broken"
    assert ("me/fox" in hub.files) == allowed
    if not allowed:
        folder = weights.parent / UPLOAD
        command = f"hf repo create me/fox --private --exist-ok && hf upload me/fox {folder}"
        assert f"since checks failed. To upload it by hand: {command}" in caplog.text
        assert (folder / "weights.zip").is_file() and (folder / "README.md").is_file()


def test_a_token_that_cannot_write_costs_no_training(
    photos: Path, use_vault: Path, hub: Hub, tmp_path: Path
) -> None:
    from trainer.run import train_from_inputs

    hub.user["auth"]["accessToken"]["role"] = "read"
    with pytest.raises(SettingsError, match="is read-only"):
        train_from_inputs(
            TrainingInputs(dataset=photos, output_dir=tmp_path / "out", hf_repo_id="me/fox"),
            hf_token=hub.token,
        )
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("key", "variable"), [("hf_token", "HF_TOKEN"), ("wandb_api_key", "WANDB")]
)
def test_a_key_in_a_file_is_refused_unshown_and_sent_to_the_environment(
    key: str, variable: str, tmp_path: Path
) -> None:
    from trainer.settings.config import read_config

    (tmp_path / "run.yaml").write_text(f"dataset: a.zip\ntrain: {{{key}: hf_abcdef}}\n")
    with pytest.raises(
        SettingsError, match=f"{key}; secrets do not belong in files; set {variable}"
    ) as no:
        read_config(tmp_path / "run.yaml")
    assert "hf_abcdef" not in str(no.value)
