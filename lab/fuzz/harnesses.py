"""One function for each reader of what strangers send, and the input to start mutating from.

A harness takes any bytes. It returns where they were read or refused with the reader's own error,
and lets everything else through: that is a finding. The first byte may choose where the rest goes,
so that mutations reach behind the sums of an archive.
"""

import io
import json
import os
import tarfile
import tempfile
import unicodedata
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
from PIL import Image, ImageCms
from safetensors.torch import save
from transformers import Qwen2Tokenizer

from adapters.archive import LORA, META, PLACEHOLDER, BrokenArchive, read_archive
from adapters.placeholder_token import PlaceholderError, check_token
from families.registry import UnknownBase
from families.tokens import PromptTokenizer, split_words
from trainer.data.dataset import DatasetError, Example, name_subject, read_dataset
from trainer.data.images import check, probe
from trainer.data.members import Unusable
from trainer.learning.checkpoint import BrokenCheckpoint, is_finite, read_checkpoint, tensors_of
from trainer.settings.config import read_config
from trainer.settings.fields import SettingsError

ROOT = Path(__file__).resolve().parents[2]
CHECKPOINT = "zeroprior.checkpoint"  # the name of its header
TEMPLATE = "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"


@dataclass(frozen=True)
class Harness:
    """A reader under test."""

    run: Callable[[bytes], bool]  # whether the input was read; False: refused in order
    seeds: Callable[[], list[bytes]]  # whole inputs, each of which is read


def dataset(data: bytes) -> bool:
    """0: a file as it is. 1: as an image, 2: as a caption, 3: as the name of one in a zip."""
    where, rest = data[:1], data[1:]
    if where == b"\1":
        rest = _zip({"a.png": rest})
    elif where == b"\2":
        rest = _zip({"a.png": _picture(), "a.txt": rest})
    elif where == b"\3":
        rest = _zip({rest.decode("utf-8", "replace").replace("\0", "") or "a": _picture()})
    with _file(rest) as path:
        try:
            for example in read_dataset(path, "a photo of TOK", "<zwx>", skip_bad_images=True):
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
    return True


def weights(data: bytes) -> bool:
    """0: a file as it is. 1: as the LoRA, 2: as the placeholder, 3: as meta.json in a zip."""
    where, rest = data[:1], data[1:]
    if where in (b"\1", b"\2", b"\3"):
        members = _members() | {(LORA, PLACEHOLDER, META)[where[0] - 1]: rest}
        rest = _zip(members)
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
        rest = save(_state(), metadata={CHECKPOINT: rest.decode("utf-8", "replace")})
    with _file(rest) as path:
        try:
            found = read_checkpoint(path)
        except BrokenCheckpoint as error:
            assert str(path) in str(error)
            return False
    assert found.step == len(found.history["losses"])
    assert all(map(is_finite, tensors_of([found.parameters, found.optimizers, found.averages])))
    return True


# ---- Where mutation starts -----------------------------------------------------------------------


def _dataset_seeds() -> list[bytes]:
    files = {"a.png": _picture(), "a.txt": b"a photo of TOK", "b/c.jpg": _picture("JPEG")}
    whole = [_zip(files), _zip(files, zipfile.ZIP_DEFLATED), _tar(files), _tar(files, "w:gz")]
    return [
        *(b"\0" + each for each in whole),
        b"\1" + _picture(),
        b"\2a photo of TOK, \xe9t\xe9",
        b"\3set\\caf\xc3\xa9.png",
    ]


def _picture_seeds() -> list[bytes]:
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    profile = profile.replace(b"s\0R\0G\0B", b"w\0i\0d\0e")  # so that it is converted from
    exif = Image.Exif()
    exif[0x0112] = 6
    return [
        *(_picture(kind) for kind in ("PNG", "JPEG", "WEBP")),
        _picture("JPEG", icc_profile=profile, exif=exif, progressive=True),
        _picture("PNG", icc_profile=profile),
        _picture("WEBP", icc_profile=profile, lossless=True),
        _picture("JPEG", mode="CMYK"),
        _picture("PNG", mode="P", transparency=0),
        _picture("PNG", mode="I;16"),
        _picture("PNG", mode="LA"),
    ]


def _weights_seeds() -> list[bytes]:
    members = _members()
    whole = [_zip(members), _zip(members, zipfile.ZIP_DEFLATED), _tar(members), members[LORA]]
    layer = "lora_unet_layers_0_attention_to_q"
    kohya = {
        f"{layer}.lora_down.weight": torch.ones(2, 8),
        f"{layer}.lora_up.weight": torch.ones(8, 2),
        f"{layer}.alpha": torch.tensor(1.0),
    }
    return [
        *(b"\0" + each for each in whole),
        b"\0" + save(kohya),
        *(bytes([place]) + members[name] for place, name in enumerate(members, start=1)),
    ]


def _config_seeds() -> list[bytes]:
    ours = [file.read_bytes() for file in sorted((ROOT / "configs").rglob("*.yaml"))]
    return [*ours, b"dataset: a.zip\nbase_model: miniature\ntrain: {steps: 2, rank: 1}\n"]


def _caption_seeds() -> list[bytes]:
    texts = (
        "<zwx>\na photo of TOK, <zwx> and zwx",
        "ohwxq\nohwxq's ohwxqs TOK 的ohwxq",
        "[\\1+$\nTOK<|im_end|>\n<|im_start|>system {} [\\1+$",
        "<é>\ne\u0301 <é> <e\u0301> 🐈‍⬛ \u202eصورة",
    )
    return [text.encode() for text in texts]


def _checkpoint_seeds() -> list[bytes]:
    moments = [[name, {"tensor": f"optimizers.lora.state.0.{name}"}] for name in ("step", "exp")]
    group = {"pairs": [["params", [0]], ["lr", 1e-3], ["betas", [0.9, 0.999]], ["fused", True]]}
    state = {"pairs": [[0, {"pairs": moments}]]}
    optimizer = {"pairs": [["state", state], ["param_groups", [group]]]}
    header = {
        "format_version": 2,
        "step": 2,
        "identity": {"rank": 2, "settings": {"seed": 5}, "data": {"a.png": ["00", "11"]}},
        "history": {"losses": [0.5, 0.25], "row_norms": [], "validation": [[0, 0.5], [2, 0.25]]},
        "averaged_steps": 0,
        "state": {
            "parameters": {"pairs": [["lora.0", {"tensor": "parameters.lora.0"}]]},
            "optimizers": {"pairs": [["lora", optimizer]]},
            "averages": {"pairs": []},
        },
    }
    text = json.dumps(header)
    return [b"\0" + save(_state(), metadata={CHECKPOINT: text}), b"\1" + text.encode()]


@cache
def _state() -> dict[str, torch.Tensor]:
    """The tensors of a checkpoint."""
    return {
        "parameters.lora.0": torch.ones(2, 8),
        "optimizers.lora.state.0.step": torch.tensor(2.0),
        "optimizers.lora.state.0.exp": torch.ones(2, 8),
    }


@cache
def _members() -> dict[str, bytes]:
    """What a weights.zip holds: LoRA, placeholder and meta.json."""
    layer = "transformer.layers.0.attention.to_q"
    chance = torch.Generator().manual_seed(0)
    down, up, row = (torch.randn(size, generator=chance) for size in ((2, 8), (8, 2), (1, 8)))
    tensors = {f"{layer}.lora_A.weight": down.bfloat16(), f"{layer}.lora_B.weight": up.bfloat16()}
    settings = '{"transformer.r": 2, "transformer.lora_alpha": 2}'
    return {
        LORA: save(tensors, metadata={"format": "pt", "lora_adapter_metadata": settings}),
        PLACEHOLDER: save({"<zwx>": row}),
        META: b'{"base_model": "Tongyi-MAI/Z-Image", "format_version": 1, "rank": 2, '
        b'"train_placeholder_token": true, "placeholder_token": "<zwx>"}',
    }


def _picture(format: str = "PNG", mode: str = "RGB", **options: object) -> bytes:
    content = io.BytesIO()
    Image.effect_mandelbrot((24, 16), (-2, -1, 1, 1), 9).convert(mode).save(
        content, format, **options
    )
    return content.getvalue()


@cache
def _prompts() -> PromptTokenizer:
    folder = ROOT / "miniature" / "weights" / "miniature-turbo" / "tokenizer"
    return PromptTokenizer(Qwen2Tokenizer.from_pretrained(folder), TEMPLATE)


@cache
def _special_ids() -> set[int]:
    added = _prompts().tokenizer.added_tokens_decoder
    return {number for number, token in added.items() if token.special}


def _zip(files: dict[str, bytes], packing: int = zipfile.ZIP_STORED) -> bytes:
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w", packing) as zipped:
        for name, data in files.items():
            zipped.writestr(zipfile.ZipInfo(name), data, packing)
    return content.getvalue()


def _tar(files: dict[str, bytes], mode: str = "w") -> bytes:
    content = io.BytesIO()
    with tarfile.open(fileobj=content, mode=mode) as tarred:  # type: ignore[call-overload]
        for name, data in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tarred.addfile(info, io.BytesIO(data))
    return content.getvalue()


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
    "dataset": Harness(dataset, _dataset_seeds),
    "picture": Harness(picture, _picture_seeds),
    "weights": Harness(weights, _weights_seeds),
    "config": Harness(config, _config_seeds),
    "caption": Harness(caption, _caption_seeds),
    "checkpoint": Harness(checkpoint, _checkpoint_seeds),
}
