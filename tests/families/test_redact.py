"""Keys in addresses are never shown, whatever is wrong with the rest of the address."""

from pathlib import Path

import pytest

from families.redact import bare_address, looks_like_address, safe_name
from inference.console import clean
from inference.engine import Engine
from inference.fetch.download import DownloadError, shown
from inference.fetch.sources import HubFile, SourceError, Sources, allowed_file
from inference.images import BrokenImage, read_image
from inference.inputs import GenerationInputs
from serving.inputs import reason
from trainer.settings.fields import SettingsError, resolve
from trainer.settings.inputs import TrainingInputs

SECRET = "SECRET"
ADDRESSES = [
    "civitai.com/api/1?token=SECRET",
    "https://civitai.com/api/1?a=b c&token=SECRET",
    "https://civitai.com/api/1?token=SECRET x",
    "https://civitai.com/api 1?token=SECRET",
    "https://civitai.com/api/1&token=SECRET",
    "https://civitai.com/api/1%3Ftoken=SECRET",
    "https://civitai.com/api/1#token=SECRET",
    "https://user:SECRET@civitai.com/api/1",
    "https://SECRET@civitai.com/api/1",
    "https://user:x/SECRET@civitai.com/api/1",
    "https://user:1/SECRET@civitai.com/api/1",
    "https://user:x?SECRET@civitai.com/api/1",
    "https:///user:SECRET@civitai.com/api/1",
    "https:/user:SECRET@civitai.com/api/1?token=SECRET",
    "https:civitai.com/api/1?token=SECRET",
    "https//civitai.com/api/1?token=SECRET",
    "htps://civitai.com/api/1?token=SECRET",
    "htps:/user:SECRET@civitai.com/api/1?token=SECRET",
    "http://civitai.com/api/1?token=SECRET",
    "user:SECRET@civitai.com/api/1",
    "SECRET@civitai.com/api/1",
    "https://civitai.com:port/api/1?token=SECRET",
    "https://[::1/api/1?token=SECRET",
    "https://civitai.com\\api?token=SECRET",
    "my file.zip?token=SECRET",
    "hf:owner/name/a b.zip@?token=SECRET",
    "  civitai.com/api/1?token=SECRET",
    "//civitai.com/api/1?token=SECRET",
]


@pytest.mark.parametrize("address", ADDRESSES)
def test_no_error_shows_the_key(
    address: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("ZEROPRIOR_FILES", str(tmp_path))

    def lookup(*_: object) -> list[str]:
        raise OSError("there is no network here")

    sources = Sources()
    monkeypatch.setattr("inference.fetch.connection.connect_to", lookup)
    object.__setattr__(sources.downloader, "addresses", lookup)
    object.__setattr__(sources.downloader, "pause", 0.0)
    for any_file in (True, False):
        with pytest.raises((SourceError, DownloadError)) as error:
            sources.file(address, None, any_file)
        reported = reason(error.value, {"lora_weights": address, "prompt": "x"})
        assert SECRET not in str(error.value) + reported + clean(str(error.value))
    with pytest.raises(BrokenImage) as unread:
        read_image(address)
    assert SECRET not in str(unread.value)
    for name in ("dataset", "resume_from"):
        given = {"dataset": "a.zip", name: address}
        if not looks_like_address(address):
            continue
        with pytest.raises(
            SettingsError, match=f"^{name} .* URLs are not supported here: download"
        ):
            resolve(TrainingInputs(base_model="miniature", **given))
    with pytest.raises(ValueError) as base:
        Engine().predict(
            GenerationInputs(prompt="x", base_model=address), any_file=True, output_dir=None
        )
    assert SECRET not in str(base.value)
    assert SECRET not in shown(address) + safe_name(address)


@pytest.mark.parametrize(
    "text",
    [
        "civitai.com/api/1?token=SECRET",
        "'civitai.com/api/1?token=SECRET': not there",
        "(civitai.com/api/1?a=1&token=SECRET).",
        "user:SECRET@civitai.com/api/1",
        "'user:SECRET@civitai.com/api/1?token=SECRET', and more",
    ],
)
def test_no_line_of_the_log_shows_the_key_of_an_address_without_its_scheme(text: str) -> None:
    assert SECRET not in clean(text)
    assert "civitai.com/api/1" in clean(text)


@pytest.mark.parametrize(
    "text",
    ["is it a.b? yes", "what?a=b", "me@example.com", "at 12:30 @ 5.5", "<a:b@c>", "1.5?x"],
)
def test_other_text_stays(text: str) -> None:
    assert clean(text) == text


@pytest.mark.parametrize(
    "text", ["civitai.com/a/1?token=x", "huggingface.com/me/x", "https:/h.io/x"]
)
def test_an_address_without_https_is_told_so(text: str) -> None:
    for read in (Sources().file, allowed_file):
        with pytest.raises(SourceError, match="a URL must begin with https://"):
            read(text)


@pytest.mark.parametrize(
    "text", ["weights.zip", "my folder/lora.v2.zip", "../a.zip", "a@v1.zip", ""]
)
def test_a_file_is_named_as_it_was_given(text: str) -> None:
    assert not looks_like_address(text)
    assert safe_name(text) == text


def test_host_and_path_stay() -> None:
    assert (
        bare_address("https://u:p@h.example:8443/a/b.zip?x#y") == "https://h.example:8443/a/b.zip"
    )
    assert bare_address("https://unpkg.com/@scope/x") == "https://unpkg.com/@scope/x"
    file = HubFile.parse("hf:owner/name/a.zip@main?token=x")
    assert file is not None and (file.file, file.revision) == ("a.zip", "main")
