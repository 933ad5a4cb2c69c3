"""One function for each reader of what strangers send; `lab.fuzz.seeds` is where mutation starts.

A harness takes any bytes. It returns where they were read or refused with the reader's own error,
and lets everything else through: that is a finding. The first byte may choose where the rest goes,
so that mutations reach behind the sums of an archive.
"""

import os
import tempfile
import unicodedata
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from safetensors.torch import save
from transformers import Qwen2Tokenizer

from adapters.archive import LORA, META, PLACEHOLDER, BrokenArchive, read_archive
from adapters.placeholder_token import PlaceholderError, check_token
from families.registry import UnknownBase
from families.tokens import PromptTokenizer, split_words
from lab.fuzz.seeds import (
    CHECKPOINT,
    ROOT,
    TEMPLATE,
    caption_seeds,
    checkpoint_seeds,
    config_seeds,
    dataset_seeds,
    members,
    picture_file,
    picture_seeds,
    state,
    table_seeds,
    weights_seeds,
    zip_file,
)
from trainer.data.caption_files import one_line
from trainer.data.caption_tables import Names, NoCaptions, read_json, read_table
from trainer.data.dataset import DatasetError, Example, name_subject, read_dataset
from trainer.data.example import decode_mask
from trainer.data.images import check, probe
from trainer.data.members import Unusable
from trainer.learning.checkpoint import BrokenCheckpoint, is_finite, read_checkpoint, tensors_of
from trainer.settings.config import read_config
from trainer.settings.fields import SettingsError


@dataclass(frozen=True)
class Harness:
    """A reader under test."""

    run: Callable[[bytes], bool]  # whether the input was read; False: refused in order
    seeds: Callable[[], list[bytes]]  # whole inputs, each of which is read


def dataset(data: bytes) -> bool:
    """0: a file as it is. In a zip, 1: as an image, 2: as a caption, 3: as the name of an image,
    4: as a table."""
    where, rest = data[:1], data[1:]
    if where == b"\1":
        rest = zip_file({"a.png": rest})
    elif where == b"\2":
        rest = zip_file({"a.png": picture_file(), "a.txt": rest})
    elif where == b"\3":
        rest = zip_file({rest.decode("utf-8", "replace").replace("\0", "") or "a": picture_file()})
    elif where == b"\4":
        rest = zip_file(
            {"3_TOK a/a.png": picture_file(), "b.png": picture_file(), "metadata.jsonl": rest}
        )
    elif where == b"\5":
        rest = zip_file({"a.png": picture_file(), "a.mask.png": rest})
    options: dict[str, Any] = {"skip_bad_images": True, "masks": "auto"}
    with _file(rest) as path:
        try:
            for example in read_dataset(path, "a photo of TOK", "<zwx>", **options):
                assert example.name.isprintable() and "\n" not in example.caption
                assert example.image().size == (example.width, example.height)
        except DatasetError:
            return False
    return True


def picture(data: bytes) -> bool:
    """An image's file."""
    try:
        probe(data)
        found = check(data)
    except Unusable:
        return False
    image = Example("a", "", found.width, found.height, data).image()
    assert image.mode == "RGB" and image.size == (found.width, found.height)
    for transparency in (False, True):
        assert decode_mask(data, transparency).size == image.size
    return True


def table(data: bytes) -> bool:
    """Captions of many images, whose format the first byte chooses; 4: the JSON of one image."""
    where, rest = data[:1], data[1:]
    suffixes = {b"\0": ".jsonl", b"\1": ".csv", b"\2": ".tsv", b"\3": ".json"}
    name = f"set/captions{suffixes.get(where, '.json')}"
    try:
        if where == b"\4":
            captions, _ = read_json(name, rest)
        else:
            found = read_table(name, rest)
            captions = [caption for row in found.rows.values() for caption in row]
            names = Names(["set/a.jpg", "set/b/a.png", "c.jpg"])
            assert all(names.find(image, name) is not None for image in found.rows)
    except (NoCaptions, Unusable):
        return False
    assert captions and all("\n" not in one_line(each) for each in captions)
    return True


def weights(data: bytes) -> bool:
    """0: a file as it is. 1: as the LoRA, 2: as the placeholder, 3: as meta.json in a zip."""
    where, rest = data[:1], data[1:]
    if where in (b"\1", b"\2", b"\3"):
        files = members() | {(LORA, PLACEHOLDER, META)[where[0] - 1]: rest}
        rest = zip_file(files)
    with _file(rest) as path:
        try:
            archive = read_archive(path)
        except BrokenArchive:
            return False
    assert archive.deltas
    for delta in archive.deltas.values():
        if isinstance(delta, tuple):
            down, up = delta
            assert down.isfinite().all() and up.isfinite().all() and len(down) == up.shape[1]
    for token in archive.tokens:
        check_token(token)
    return True


def config(data: bytes) -> bool:
    """A YAML file of `python -m trainer`."""
    with _file(data) as path:
        try:
            read_config(path, dataset="a.zip")
        except (SettingsError, PlaceholderError, UnknownBase):
            return False
    return True


def caption(data: bytes) -> bool:
    """A placeholder, and a caption on the next line, up to the ids and back."""
    word, _, text = data.decode("utf-8", "replace").partition("\n")
    prompts = _prompts()
    try:
        check_token(word, prompts)
    except PlaceholderError:
        return False
    named = name_subject(text, word)
    found, frame = prompts.tokenize(named, {word: 1}), prompts.tokenize("")
    special = _special_ids()
    assert [i for i in found.ids if i in special] == [i for i in frame.ids if i in special]

    read, start = "", 0
    for at in (*(at for at, _, _ in found.new), len(found.ids)):
        read += prompts.tokenizer.decode(found.ids[start:at]) + word * (at < len(found.ids))
        start = at + 1
    parts = split_words(TEMPLATE.replace("{}", named), [word])
    assert read == "".join(p if p == word else unicodedata.normalize("NFC", p) for p in parts)
    return True


def checkpoint(data: bytes) -> bool:
    """0: a file as it is. 1: as the header of a checkpoint, whose tensors are whole."""
    where, rest = data[:1], data[1:]
    if where == b"\1":
        rest = save(state(), metadata={CHECKPOINT: rest.decode("utf-8", "replace")})
    with _file(rest) as path:
        try:
            found = read_checkpoint(path)
        except BrokenCheckpoint as error:
            assert str(path) in str(error)
            return False
    assert found.step == len(found.history["losses"])
    assert all(map(is_finite, tensors_of([found.parameters, found.optimizers, found.averages])))
    return True


@cache
def _prompts() -> PromptTokenizer:
    folder = ROOT / "miniature" / "weights" / "miniature-turbo" / "tokenizer"
    return PromptTokenizer(Qwen2Tokenizer.from_pretrained(folder), TEMPLATE)


@cache
def _special_ids() -> set[int]:
    added = _prompts().tokenizer.added_tokens_decoder
    return {number for number, token in added.items() if token.special}


@contextmanager
def _file(content: bytes) -> Iterator[Path]:
    handle, name = tempfile.mkstemp(prefix="zeroprior-fuzz-")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
        yield Path(name)
    finally:
        os.unlink(name)


HARNESSES = {
    "dataset": Harness(dataset, dataset_seeds),
    "picture": Harness(picture, picture_seeds),
    "table": Harness(table, table_seeds),
    "weights": Harness(weights, weights_seeds),
    "config": Harness(config, config_seeds),
    "caption": Harness(caption, caption_seeds),
    "checkpoint": Harness(checkpoint, checkpoint_seeds),
}
