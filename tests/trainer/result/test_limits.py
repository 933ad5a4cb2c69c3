"""What settings and dataset may hold can be saved and read back: the writer has the limits."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from adapters.archive import Archive, read_archive, write_archive
from adapters.archive_members import MAX_META_BYTES
from adapters.placeholder import Placeholder
from trainer import run
from trainer.data.dataset import Example, read_dataset
from trainer.data.members import MAX_CAPTION_BYTES, MAX_MEMBERS
from trainer.learning.history import Trained
from trainer.learning.resume import data_identity
from trainer.monitor.validation import Curves
from trainer.result import meta
from trainer.result.record import TrainingRecord
from trainer.settings.fields import Settings, SettingsError
from trainer.settings.inputs import LENGTHS

FACTORS = {"layers.0.attention.to_q": (torch.ones(2, 8), torch.ones(8, 2))}
# Settings that are free text, and come into meta.json.
TEXTS = ("default_caption", "caption_prefix", "caption_suffix", "trigger_word", "lora_targets")


def described(
    settings: Settings, examples: list[Example], curves: Curves | None = None
) -> dict[str, Any]:
    trained = Trained([1.0], 1.0, [[1.0]])
    proofs = [{"placeholder_token_id": 1.0}]
    dataset = meta.DatasetFile(settings.dataset).describe(examples)
    curves = curves or Curves([], [], [], [])
    return TrainingRecord.of(settings, dataset, trained, proofs, None, curves).meta()


def read_back(facts: dict[str, Any], folder: Path) -> dict[str, Any]:
    token = facts.get("placeholder_token")
    words = (Placeholder(token, torch.ones(1, 8)),) if token else ()
    return read_archive(write_archive(Archive(FACTORS, words, facts), folder / "weights.zip")).meta


def captions_of(kind: str) -> str:
    """A caption of the largest size that a dataset may hold."""
    letter = {"english": "a", "japanese": "\u3042", "escaped": "\x02", "quotes": '"'}[kind]
    return letter * (MAX_CAPTION_BYTES // len(letter.encode()))


@pytest.mark.parametrize("kind", ["english", "japanese", "escaped", "quotes"])
@pytest.mark.parametrize("count", [70, 300])
def test_captions_of_any_size_can_be_saved(
    kind: str, count: int, small: Callable[..., Settings], tmp_path: Path
) -> None:
    captions = captions_of(kind)
    examples = [Example(f"{number}.png", captions, 8, 8, b"") for number in range(count)]
    facts = described(small(train_placeholder_token=False), examples)
    found = read_back(facts | {"checks": []}, tmp_path)
    assert found["left_out"]["captions"].startswith(f"{count} are truncated")
    assert len(found["dataset"]["pictures"]) == count


def test_as_many_images_as_a_dataset_may_hold_can_be_saved(
    small: Callable[..., Settings], tmp_path: Path
) -> None:
    examples = [
        Example(f"{number:06d}" + "\u3042" * 900, "a photo", 8, 8, b"") for number in range(5000)
    ]
    many = [*examples] * (MAX_MEMBERS // len(examples))
    found = read_back(described(small(), many), tmp_path)
    assert 0 < len(found["dataset"]["pictures"]) < len(many)
    assert "are omitted" in found["left_out"]["pictures"]
    names = data_identity(examples)
    assert len(names) == len(examples) and max(map(len, names)) < 140


def test_as_many_measurements_as_a_run_may_have_can_be_saved(
    small: Callable[..., Settings], tmp_path: Path
) -> None:
    steps = [*range(100_001)]
    curves = Curves([0.1, 0.2, 0.3, 0.4], [], steps, [[1 / 3, 2 / 3, 1 / 7, 1 / 9]] * len(steps))
    found = read_back(described(small(), [], curves), tmp_path)
    kept = found["fit"]["steps"]
    assert (kept[0], kept[-1], len(kept)) == (0, 100_000, meta.MEASUREMENTS)
    assert len(found["fit"]["losses"]) == len(kept)
    assert "left_out" not in read_back(described(small(), []), tmp_path)


@pytest.mark.parametrize("letter", ["a", "\u3042", "\x02"], ids=["plain", "wide", "escaped"])
def test_every_text_setting_at_its_bound_can_be_saved_and_beyond_it_is_refused(
    letter: str, small: Callable[..., Settings], tmp_path: Path
) -> None:
    most = {name: letter * LENGTHS[name] for name in TEXTS}
    prompts = (letter * 9_999, letter * 10_000)  # with the line end between them
    options = {"negative_prompt": letter * 10_000}
    plain = {"train_placeholder_token": False, **most}  # with a token there is no trigger word
    settings = small(sample_prompts=prompts, sample_options=options, **plain)
    facts = described(settings, [Example("a.png", most["default_caption"], 8, 8, b"")] * 100)
    found = read_back(facts, tmp_path)
    assert {name: found["settings"][name] for name in TEXTS} == most
    for name, text in most.items():
        with pytest.raises(SettingsError, match=f"{name} has {LENGTHS[name] + 1:,} characters"):
            small(**plain | {name: text + letter})
    with pytest.raises(SettingsError, match="sample_prompts has"):
        small(sample_prompts=[letter * 10_000] * 2)
    with pytest.raises(SettingsError, match="negative_prompt has"):
        small(sample_options={"negative_prompt": letter * 10_001})


def test_more_than_can_be_read_back_is_not_written(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="meta.json would have .* is the limit"):
        read_back({"text": "a" * MAX_META_BYTES}, tmp_path)
    assert not (tmp_path / "weights.zip").exists()
    assert read_back({"text": "a" * (MAX_META_BYTES // 2 - 100)}, tmp_path)["text"]
    assert read_back({"text": "half \udcff"}, tmp_path)["text"] == "half \udcff"


@pytest.mark.slow
def test_a_run_with_long_captions_writes_weights(
    small: Callable[..., Settings], photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = "TOK " + captions_of("japanese")[:21_000]
    examples = read_dataset(photos, "a photo of TOK", "<zwx>")
    many = [
        replace(each, name=f"{turn} {each.name}", caption=text.replace("TOK", "<zwx>"))
        for turn in range(12)
        for each in examples
    ]
    monkeypatch.setattr(run, "read_examples", lambda *_: many)
    facts = read_archive(run.train(small(steps=1, resolution="32", validation_every=0))).meta
    assert len(facts["dataset"]["pictures"]) == 72
